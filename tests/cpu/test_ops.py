"""The ops in Triton's interpreter against float64: hard inputs, shapes, bad arguments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from sglang_trinv import config, ops
from sglang_trinv.errors import UnsupportedCall
from sglang_trinv.reference.bounds import rounding_bound
from sglang_trinv.reference.chunk import naive_fwd_intra, naive_solve_tril
from sglang_trinv.reference.methods import invert
from sglang_trinv_cpu_platform import bfloat16
from tests.inputs import (
    GVA_RATIOS,
    HARD_INPUTS,
    LENGTHS,
    OUTSIDE_BOUND,
    REAL_GATES,
    cu_seqlens_of,
    hard_matrices,
    poisoned_allocations,
    real_gate_inputs,
)
from tests.op_checks import check_fwd_intra, run_fwd_intra
from tests.tolerance import rel_err, tolerance

DTYPES = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy: exp2 above the diagonal


@pytest.fixture(autouse=True)
def interpreter_bfloat16() -> Iterator[None]:
    undo = bfloat16.install()
    yield
    undo()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HARD_INPUTS)
def test_hard_inputs(name: str, dtype: torch.dtype) -> None:
    check_fwd_intra(HARD_INPUTS[name].build(64, Hg=8, K=32, V=32, dtype=dtype).summed())


@pytest.mark.parametrize("name", OUTSIDE_BOUND)
def test_outside_the_bound_with_split_operands(name: str) -> None:
    check_fwd_intra(OUTSIDE_BOUND[name].build(64, Hg=8, K=32, V=32).summed(), "mbh_bf16x3")


def test_fp16_method_outside_the_bound_is_worse_than_stock() -> None:
    """The negative example: why the x3 methods exist."""
    x = OUTSIDE_BOUND["equal keys of length 1.5"].build(64, K=64, V=64).summed()
    with pytest.raises(AssertionError, match=r"is above|not finite"):
        check_fwd_intra(x, "mbh_fp16")


@pytest.mark.parametrize("method", ["auto", "mbh_bf16x3"])
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(name: str, method: str) -> None:
    lengths = LENGTHS[name]
    x = HARD_INPUTS["random"].build(sum(lengths), K=16, V=32, lengths=lengths).summed()
    if not sum(lengths):
        w, u, Ai = run_fwd_intra(x, method)
        assert (w.shape, u.shape, Ai.shape) == (x.k.shape, x.v.shape, (1, 0, 1, 64))
        return
    check_fwd_intra(x, method)


@pytest.mark.parametrize("method", ["auto", "mbh_bf16x3"])
@pytest.mark.parametrize("ratio", GVA_RATIOS)
def test_value_heads_per_key_head(ratio: int, method: str) -> None:
    x = HARD_INPUTS["random"].build(70, Hg=2, H=2 * ratio, K=32, V=48).summed()
    check_fwd_intra(x, method)


@pytest.mark.parametrize("name", REAL_GATES)
def test_real_gates(name: str) -> None:
    x = real_gate_inputs(name, H=1, K=32, V=32)
    end = 256
    lengths = [int(n) for n in x.cu_seqlens.clamp(max=end).diff() if n]
    x = replace(
        x, q=x.q[:, :end], k=x.k[:, :end].contiguous(), v=x.v[:, :end].contiguous(),
        g=x.g[:, :end].contiguous(), beta=x.beta[:, :end].contiguous(),
        cu_seqlens=cu_seqlens_of(lengths),
    )  # fmt: skip
    check_fwd_intra(x.summed())


def test_a_batch_of_equal_lengths() -> None:
    rows = [HARD_INPUTS["random"].build(70, K=32, V=32, seed=s).summed() for s in (0, 1)]
    k, v, g, beta = (torch.cat([getattr(r, n) for r in rows]) for n in ("k", "v", "g", "beta"))
    w, u, _ = ops.fwd_intra(k, v, g, beta)
    for b, row in enumerate(rows):
        alone = run_fwd_intra(row)
        assert torch.equal(w[b : b + 1], alone[0])
        assert torch.equal(u[b : b + 1], alone[1])


def test_a_sequence_does_not_feel_its_neighbours() -> None:
    x = HARD_INPUTS["two clusters"].build(111, K=32, V=32, lengths=[40, 71]).summed()
    w, u, Ai = run_fwd_intra(x)
    cut = replace(
        x, k=x.k[:, 40:].contiguous(), v=x.v[:, 40:].contiguous(), g=x.g[:, 40:].contiguous(),
        beta=x.beta[:, 40:].contiguous(), cu_seqlens=None,
    )  # fmt: skip
    for packed, alone in zip((w, u, Ai), run_fwd_intra(cut), strict=True):
        assert torch.equal(packed[:, 40:], alone)


@pytest.mark.parametrize("method", ["auto", "mbh_bf16x3"])
def test_without_decay_and_with_beta_in_the_dtype_of_k(method: str) -> None:
    x = HARD_INPUTS["random"].build(66, K=32, V=32).summed()
    w, u, _ = ops.fwd_intra(x.k, x.v, None, x.beta.bfloat16(), method=method)
    W, U, _ = naive_fwd_intra(x.k, x.v, None, x.beta.bfloat16())
    assert rel_err(w, W) <= 2 * rel_err(W.bfloat16(), W)
    assert rel_err(u, U) <= 2 * rel_err(U.bfloat16(), U)


@pytest.mark.parametrize("lengths", [[64, 0, 111, 1], [0, 0, 130], [2] * 70 + [0, 65], [0, 0]])
def test_chunks_are_found_without_chunk_indices(lengths: list[int]) -> None:
    x = HARD_INPUTS["random"].build(sum(lengths), K=16, V=16, lengths=lengths).summed()
    with poisoned_allocations():
        found = run_fwd_intra(x, chunk_indices=False)
    for a, b in zip(run_fwd_intra(x), found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", ["mbh_fp16", "mbh_tf32", "mbh_tf32x3", "mbh_bf16x3"])
@pytest.mark.parametrize("n", [16, 32, 64])
def test_solve_tril_on_hard_matrices(n: int, method: str) -> None:
    """Within 1.2 times the emulated error of SGLang's method (fp32 substitution on 16 x 16, tf32
    merges); a method with 11 significant bits as if the result were stored in bfloat16."""
    for name, A in hard_matrices(n, batch=2).items():
        A = A.float()
        packed = A.transpose(0, 1)[None].contiguous()  # [1, n, heads, n]
        packed = packed + torch.full((n, n), torch.nan).triu()[None, :, None]  # not to be read
        with poisoned_allocations():
            Ai = ops.solve_tril(packed, method=method)[0].transpose(0, 1)
        truth = naive_solve_tril(A.transpose(0, 1)[None])[0].transpose(0, 1)
        dtype = torch.float32 if method.endswith("x3") else torch.bfloat16
        bound = tolerance(truth, invert(A, "FS16", "tf32rz").to(dtype), dtype)
        if method.endswith("x3"):  # at n = 16 SGLang's is plain float32
            bound = max(bound, rounding_bound(n, ops.METHODS[method]))
        assert rel_err(Ai, truth) <= bound, name


@pytest.mark.parametrize("n", [16, 32, 64])
def test_solve_tril_to_bfloat16_errs_by_rounding_its_result(n: int) -> None:
    for name, A in hard_matrices(n, batch=2).items():
        A = A.float().transpose(0, 1)[None].contiguous()
        truth = naive_solve_tril(A)
        Ai = ops.solve_tril(A, output_dtype=torch.bfloat16)
        rounded = truth.to(torch.bfloat16)
        assert rel_err(Ai, truth) <= tolerance(truth, rounded, torch.bfloat16), name


def test_solve_tril_varlen_and_dtypes() -> None:
    A = 0.2 * torch.randn(1, 130, 2, 64, generator=torch.Generator().manual_seed(0))
    cu_seqlens = cu_seqlens_of([30, 0, 100])  # the chunks of a ragged batch are found by the kernel
    truth = naive_solve_tril(A, cu_seqlens)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with poisoned_allocations():
            Ai = ops.solve_tril(A, cu_seqlens, dtype)
        assert Ai.dtype == dtype
        floor = max(rel_err(truth.to(dtype), truth), 2**-20)
        assert rel_err(Ai, truth) <= 1.2 * floor


def test_names_of_methods_are_the_same_everywhere() -> None:
    assert tuple(ops.METHODS) == config.METHODS


def test_the_torch_path_is_named_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    x = HARD_INPUTS["random"].build(70, K=16, V=16).summed()
    assert ops.implementation("cpu") == "triton-interpreter"
    interpreted = run_fwd_intra(x)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert ops.implementation("cpu") == "torch"
    for a, b in zip(run_fwd_intra(x), interpreted, strict=True):
        assert rel_err(a, b.double()) < 2**-7  # two roundings to bfloat16


def arguments(**changes: object) -> dict:
    x = HARD_INPUTS["random"].build(64, K=16, V=16).summed()
    return {"k": x.k, "v": x.v, "g": x.g, "beta": x.beta, **changes}


BAD = {
    "k: want shape": {"k": torch.zeros(1, 63, 1, 16).bfloat16()},
    "k: want dtype bfloat16": {"k": torch.zeros(1, 64, 1, 16).half()},
    "k: want a last dimension": {"k": torch.zeros(1, 64, 1, 15).bfloat16()},
    "k: want a number of key heads": {"k": torch.zeros(1, 64, 2, 16).bfloat16()},
    "k: want a contiguous": {"k": torch.zeros(1, 64, 1, 32).bfloat16()[..., ::2]},
    "k: want a tensor": {"k": None},
    "v: want dtype": {"v": torch.zeros(1, 64, 1, 16)},
    "v: want shape": {"v": torch.zeros(64, 1, 16).bfloat16()},
    "v: want a last dimension": {"v": torch.zeros(1, 64, 1, 8).bfloat16()},
    "g: want dtype float32": {"g": torch.zeros(1, 64, 1).bfloat16()},
    "g: want a tensor on cpu": {"g": torch.zeros(1, 64, 1, device="meta")},
    "beta: want shape": {"beta": torch.zeros(1, 64, 2)},
    "beta: want a tensor": {"beta": None},
    "chunk_size: want 64": {"chunk_size": 32},
    "cu_seqlens: want dtype": {"cu_seqlens": torch.zeros(2)},
    "chunk_indices: want None": {"chunk_indices": torch.zeros(1, 2, dtype=torch.int32)},
    "method: want one of": {"method": "mxr16"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message: str) -> None:
    with pytest.raises(UnsupportedCall, match=f"^{message}"):
        ops.fwd_intra(**arguments(**BAD[message]))


BAD_TRIL = {
    "A: want shape": (torch.zeros(1, 64, 64), {}),
    "A: want a last dimension": (torch.zeros(1, 64, 1, 48), {}),
    "A: want dtype": (torch.zeros(1, 64, 1, 64, dtype=torch.float64), {}),
    "A: want a tensor on cuda or cpu": (torch.zeros(1, 64, 1, 64, device="meta"), {}),
    "output_dtype: want": (torch.zeros(1, 64, 1, 64), {"output_dtype": torch.int8}),
    "cu_seqlens: want None": (
        torch.zeros(2, 64, 1, 64), {"cu_seqlens": torch.tensor([0, 64])},
    ),
    "method: want": (torch.zeros(1, 64, 1, 64), {"method": ""}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_TRIL)
def test_bad_arguments_of_solve_tril_are_named(message: str) -> None:
    A, options = BAD_TRIL[message]
    with pytest.raises(UnsupportedCall, match=f"^{message}"):
        ops.solve_tril(A, **options)


def test_bad_arguments_of_kkt_solve_are_named() -> None:
    x = arguments()
    with pytest.raises(UnsupportedCall, match="^beta: want"):
        ops.kkt_solve(x["k"], x["g"])
    with pytest.raises(UnsupportedCall, match="^output_dtype: want"):
        ops.kkt_solve(x["k"], x["g"], x["beta"], output_dtype=torch.float64)
