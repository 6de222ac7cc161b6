"""KDA's intra-chunk step in Triton's interpreter against float64, and the reference itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from sglang_trinv import ops
from sglang_trinv.errors import UnsupportedCall
from sglang_trinv.ops.chunks import PADDING_CHUNK
from sglang_trinv.reference.chunk import chunk_local_cumsum, naive_fwd_intra
from sglang_trinv.reference.kda import naive_kda_forward, naive_kda_intra
from sglang_trinv.reference.recurrence import naive_kda
from sglang_trinv_cpu_platform import bfloat16
from tests.inputs import HARD_INPUTS, LENGTHS, OUTSIDE_BOUND, chunk_indices_of, cu_seqlens_of
from tests.kda_checks import (
    RANDOM,
    STEEP_GATES,
    check_kda,
    kda_inputs,
    lower,
    run_kda,
    stock_kda_emulated,
)
from tests.tolerance import rel_err

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def interpreter_bfloat16() -> Iterator[None]:
    undo = bfloat16.install()
    yield
    undo()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HARD_INPUTS)
def test_hard_inputs(name: str, dtype: torch.dtype) -> None:
    check_kda(kda_inputs(HARD_INPUTS[name], 64, H=8, dtype=dtype))


@pytest.mark.parametrize("name", ["cosine 0.998", "equal keys of length 0.9"])
def test_w_of_near_equal_keys_keeps_more_than_the_chain_of_bfloat16(name: str) -> None:
    """w is a difference of almost equal rows: in float16 it is several times as true."""
    seen = check_kda(kda_inputs(HARD_INPUTS[name], 128, H=4, K=128, V=128))
    error, allowed = seen["w"]
    assert error <= allowed / 1.2 / 3


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [("random", DTYPES[1]), ("cosine 0.98", DTYPES[0]), ("equal keys, beta 1", DTYPES[0])],
)
@pytest.mark.parametrize("name", STEEP_GATES)
def test_steep_gates(name: str, keys: str, dtype: torch.dtype) -> None:
    check_kda(kda_inputs(HARD_INPUTS[keys], 100, H=4, dtype=dtype, gates=STEEP_GATES[name]))


@pytest.mark.parametrize("name", OUTSIDE_BOUND)
def test_outside_the_bound_with_split_operands(name: str) -> None:
    check_kda(kda_inputs(OUTSIDE_BOUND[name], 64, H=4), "mbh_bf16x3")


@pytest.mark.parametrize("method", ["auto", "mbh_bf16x3"])
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(name: str, method: str) -> None:
    lengths = LENGTHS[name]
    x = kda_inputs(RANDOM, sum(lengths), H=1, K=16, lengths=lengths)
    if not sum(lengths):
        w, u, _, kg, Aqk, Akk = run_kda(x, method)
        assert (w.shape, u.shape, kg.shape) == (x.k.shape, x.v.shape, x.k.shape)
        assert Aqk.shape == Akk.shape == (1, 0, 1, 64)
        return
    check_kda(x, method)


@pytest.mark.parametrize(("K", "V"), [(16, 48), (48, 16), (64, 128)])
def test_head_dims(K: int, V: int) -> None:
    check_kda(kda_inputs(HARD_INPUTS["cosine 0.5"], 64, H=1, K=K, V=V))


def test_a_sequence_does_not_feel_its_neighbours() -> None:
    x = kda_inputs(HARD_INPUTS["two clusters"], 111, lengths=[40, 71], gates=STEEP_GATES["spikes"])
    packed, alone = run_kda(x), run_kda(x.rows(40, 111))
    for a, b in zip(packed, alone, strict=True):
        assert a is b is None or torch.equal(_read(x, a)[:, 40:], _read(x.rows(40, 111), b))


def test_padding_rows_of_chunk_indices_cost_nothing_and_write_nothing() -> None:
    x = kda_inputs(RANDOM, 100, lengths=[70, 30])
    padding = torch.tensor([[0, PADDING_CHUNK]] * 3, dtype=torch.int32)
    padded = torch.cat([chunk_indices_of(x.cu_seqlens), padding])
    plain = run_kda(x)
    for indices in (padded, None):
        found = ops.chunk_kda_fwd_intra(
            x.q, x.k, x.v, x.gk, x.beta, None, x.cu_seqlens, 64, indices
        )
        for a, b in zip(found, plain, strict=True):
            assert a is b is None or torch.equal(_read(x, a), _read(x, b))


def _read(x, t):
    return lower(x, t) if t.shape[-1] == 64 else t


def test_equal_channels_are_the_gated_delta_rule() -> None:
    """With one gate for all channels KDA is GDN: two independent references agree."""
    x = kda_inputs(RANDOM, 130, lengths=[60, 70])
    g = x.gk[..., :1]
    x = replace(x, gk=g.expand_as(x.gk).contiguous())
    w, u, _, _, Akk = naive_kda_intra(x.q, x.k, x.v, x.gk, x.beta, None, x.cu_seqlens)
    gdn = naive_fwd_intra(x.k, x.v, g[..., 0].double() * math.log(2), x.beta, x.cu_seqlens)
    for a, b in zip((w, u, Akk), gdn, strict=True):
        assert rel_err(a, b) < 1e-12


@pytest.mark.parametrize("steep", [0.1, 30.0])
def test_the_reference_is_the_token_recurrence(steep: float) -> None:
    x = kda_inputs(HARD_INPUTS["cosine 0.5"], 200, lengths=[130, 0, 70])
    g = -steep * torch.rand(x.gk.shape, generator=torch.Generator().manual_seed(3)).double()
    gk = chunk_local_cumsum(g, x.cu_seqlens) * math.log2(math.e)
    state = torch.randn(3, 2, 16, 16, dtype=torch.float64)
    chunked = naive_kda_forward(x.q, x.k, x.v, gk, x.beta, None, state, x.cu_seqlens)
    tokens = naive_kda(x.q, x.k, x.v, g, x.beta, None, state, x.cu_seqlens)
    for a, b in zip(chunked, tokens, strict=True):
        assert rel_err(a, b) < 1e-12


def test_one_clamped_block_would_not_pass() -> None:
    """The negative example: gates clamped to 2^-126 lose products that check_kda wants."""
    x = kda_inputs(RANDOM, 64, gates=STEEP_GATES["5.9 nats"])
    clamped = replace(x, gk=x.gk.clamp(min=-126.0))
    truth = naive_kda_intra(x.q, x.k, x.v, x.gk, x.beta)
    assert rel_err(naive_kda_intra(x.q, x.k, x.v, clamped.gk, x.beta)[3], truth[3]) > 0.01
    check_kda(x)


def test_the_emulation_of_sglang_is_as_good_as_its_roundings() -> None:
    x = kda_inputs(RANDOM, 130, lengths=[60, 70])
    truth = naive_kda_intra(x.q, x.k, x.v, x.gk, x.beta, None, x.cu_seqlens)
    for a, t in zip(stock_kda_emulated(x), truth, strict=True):
        assert rel_err(t.bfloat16(), t) <= rel_err(a, t) < 2**-7


def test_scale_and_beta_in_the_dtype_of_k_and_the_torch_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = kda_inputs(RANDOM, 70, lengths=[70])
    beta = x.beta.bfloat16()
    call = (x.q, x.k, x.v, x.gk, beta, 2.0, x.cu_seqlens)
    interpreted = ops.chunk_kda_fwd_intra(*call, fuse_diagonal=True)
    truth = naive_kda_intra(*call)
    monkeypatch.delenv("TRITON_INTERPRET")
    torch_path = ops.chunk_kda_fwd_intra(*call)
    for i, name in enumerate(("w", "u", None, "kg", "Aqk", "Akk")):
        if name:
            t = truth[i - (i > 2)]
            assert rel_err(interpreted[i], t) < 2**-7, name
            assert torch.equal(torch_path[i], t.bfloat16()), name


def arguments(**changes: object) -> dict:
    x = kda_inputs(RANDOM, 64, K=16, V=16)
    return {"q": x.q, "k": x.k, "v": x.v, "gk": x.gk, "beta": x.beta, **changes}


BAD = {
    "q: want shape": {"q": torch.zeros(1, 64, 1, 16).bfloat16()},
    "q: want dtype bfloat16": {"q": torch.zeros(1, 64, 2, 16).half()},
    "k: want shape": {"k": torch.zeros(1, 64, 1, 16).bfloat16()},
    "k: want a last dimension": {"k": torch.zeros(1, 64, 2, 15).bfloat16()},
    "v: want dtype": {"v": torch.zeros(1, 64, 2, 16)},
    "v: want a last dimension": {"v": torch.zeros(1, 64, 2, 8).bfloat16()},
    "gk: want a tensor": {"gk": None},
    "gk: want dtype float32": {"gk": torch.zeros(1, 64, 2, 16).bfloat16()},
    "gk: want shape": {"gk": torch.zeros(1, 64, 2)},
    "beta: want a tensor": {"beta": None},
    "beta: want shape": {"beta": torch.zeros(1, 64, 1)},
    "chunk_size: want 64": {"chunk_size": 32},
    "cu_seqlens: want dtype": {"cu_seqlens": torch.zeros(2)},
    "chunk_indices: want None": {"chunk_indices": cu_seqlens_of([1])[None]},
    "method: want one of": {"method": "mxr16"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message: str) -> None:
    with pytest.raises(UnsupportedCall, match=f"^{message}"):
        ops.chunk_kda_fwd_intra(**arguments(**BAD[message]))
