"""The compiled ops on a CUDA device: hard inputs against SGLang's own kernel, real sizes, graphs.

SGLang's fla kernels must be importable; they are what the tolerance is earned from.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from sglang_trinv import ops
from sglang_trinv.reference.bounds import rounding_bound
from sglang_trinv.reference.chunk import naive_fwd_intra, naive_solve_tril
from tests.inputs import (
    GVA_RATIOS,
    HARD_INPUTS,
    LENGTHS,
    OUTSIDE_BOUND,
    REAL_GATES,
    SPLIT_METHODS,
    chunk_indices_of,
    real_gate_inputs,
)
from tests.op_checks import check_fwd_intra, run_fwd_intra
from tests.tolerance import rel_err, tolerance

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["this GPU's", "portable"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On Hopper the kernels in Gluon, and Triton's, which serve other GPUs and shapes."""
    if request.param == "portable":
        for name in ("fwd_intra", "solve_tril"):
            module = importlib.import_module(f"sglang_trinv.ops.{name}")
            monkeypatch.setattr(module, "fits_hopper", lambda *tensors: False)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HARD_INPUTS)
def test_hard_inputs(name: str, dtype: torch.dtype, kernels: str, record_property) -> None:
    x = HARD_INPUTS[name].build(512, Hg=4, H=4, dtype=dtype, device="cuda").summed()
    for output, (error, allowed) in check_fwd_intra(x).items():
        record_property(output, f"{error:.3e} of {allowed:.3e}")


@pytest.mark.parametrize("method", SPLIT_METHODS)
@pytest.mark.parametrize("name", HARD_INPUTS | OUTSIDE_BOUND)
def test_split_operands(name: str, method: str) -> None:
    case = (HARD_INPUTS | OUTSIDE_BOUND)[name]
    check_fwd_intra(case.build(512, 4, 4, device="cuda").summed(), method)


@pytest.mark.parametrize("method", SPLIT_METHODS)
@pytest.mark.parametrize("name", [name for name in LENGTHS if name != "0"])
def test_lengths_with_split_operands(name: str, method: str) -> None:
    case = HARD_INPUTS["random"]
    x = case.build(sum(LENGTHS[name]), 4, 8, lengths=LENGTHS[name], device="cuda")
    check_fwd_intra(x.summed(), method)


def test_tf32_on_hard_inputs() -> None:
    for case in HARD_INPUTS.values():
        check_fwd_intra(case.build(512, 4, 4, device="cuda").summed(), "mbh_tf32")


@pytest.mark.parametrize("name", [name for name in LENGTHS if name != "0"])
def test_lengths(name: str, kernels: str) -> None:
    lengths = LENGTHS[name]
    x = HARD_INPUTS["random"].build(sum(lengths), 4, 4, lengths=lengths, device="cuda")
    check_fwd_intra(x.summed())


@pytest.mark.parametrize("ratio", GVA_RATIOS)
def test_value_heads_per_key_head(ratio: int) -> None:
    """Few programs and many take different launch configurations."""
    for T in (100, 8192):
        x = HARD_INPUTS["random"].build(T, 16, 16 * ratio, K=64, V=64, device="cuda")
        check_fwd_intra(x.summed())


@pytest.mark.parametrize("name", REAL_GATES)
def test_real_gates(name: str) -> None:
    check_fwd_intra(real_gate_inputs(name, Hg=4, device="cuda").summed())


@pytest.fixture
def ragged() -> object:
    lengths = [1, 700, 64, 63, 300, 128]
    return HARD_INPUTS["cosine 0.98"].build(
        sum(lengths), 4, 8, lengths=lengths, device="cuda"
    ).summed()  # fmt: skip


@pytest.mark.parametrize("method", ["auto", *SPLIT_METHODS])
def test_bitwise_alone_packed_reordered_and_again(ragged, method: str) -> None:
    packed = run_fwd_intra(ragged, method)
    for a, b in zip(packed, run_fwd_intra(ragged, method), strict=True):
        assert torch.equal(a, b)
    bounds = ragged.cu_seqlens.tolist()
    for begin, end in zip(bounds, bounds[1:], strict=False):
        cut = replace(
            ragged, cu_seqlens=None,
            **{n: getattr(ragged, n)[:, begin:end].contiguous() for n in ("k", "v", "g", "beta")},
        )  # fmt: skip
        for a, b in zip(packed, run_fwd_intra(cut, method), strict=True):
            assert torch.equal(a[:, begin:end], b)
    A = ops.kkt_solve(ragged.k, ragged.g, ragged.beta, ragged.cu_seqlens, method=method)
    assert torch.equal(A, packed[2])  # no matter how many programs share the chunks


@pytest.mark.parametrize("method", ["auto", *SPLIT_METHODS])
@pytest.mark.parametrize("g", [True, False])
def test_rows_of_a_batch(g: bool, method: str, kernels: str) -> None:
    """Without cu_seqlens, three rows at once as each alone, the last chunk of each ragged."""
    case = HARD_INPUTS["cosine 0.98"]
    x = case.build(600, 4, 8, lengths=[200] * 3, device="cuda").summed()
    cut = {n: getattr(x, n).reshape(3, 200, *getattr(x, n).shape[2:]) for n in ("k", "v", "beta")}
    gates = x.g.reshape(3, 200, 8) if g else None
    options = {"method": method, "return_A": True}
    together = ops.fwd_intra(cut["k"], cut["v"], gates, cut["beta"], **options)
    for i in range(3):
        k, v, beta = (cut[n][i : i + 1] for n in ("k", "v", "beta"))
        gate = gates[i : i + 1] if g else None
        alone = ops.fwd_intra(k, v, gate, beta, **options)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[i : i + 1], b)
        assert torch.equal(ops.kkt_solve(k, gate, beta, method=method), alone[2])


def test_cuda_graph_and_no_synchronisation(ragged) -> None:
    x = ragged
    indices = chunk_indices_of(x.cu_seqlens)
    ops.fwd_intra(x.k, x.v, x.g, x.beta, x.cu_seqlens, 64, indices)  # compile first
    ops.fwd_intra(x.k, x.v, x.g, x.beta, x.cu_seqlens)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.fwd_intra(x.k, x.v, x.g, x.beta, x.cu_seqlens)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        w, u, _ = ops.fwd_intra(x.k, x.v, x.g, x.beta, x.cu_seqlens, 64, indices)
    x.k.copy_(x.k.flip(1))
    graph.replay()
    W, U, _ = ops.fwd_intra(x.k, x.v, x.g, x.beta, x.cu_seqlens, 64, indices)
    assert torch.equal(w, W)
    assert torch.equal(u, U)


def test_no_memory_beyond_the_outputs(ragged) -> None:
    x = ragged
    indices = chunk_indices_of(x.cu_seqlens)
    call = (x.k, x.v, x.g, x.beta, x.cu_seqlens, 64, indices)
    ops.fwd_intra(*call)
    torch.cuda.synchronize()
    # Requested, not allocated: a cached block may be larger than what was asked for.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    w, u, _ = ops.fwd_intra(*call)
    size = sum(t.nbytes for t in (w, u))
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before <= size


def test_offsets_beyond_31_bits() -> None:
    """T H V reaches 2^31: the last chunks are the same as those of a short call."""
    T, tail = 262144, 256
    x = HARD_INPUTS["random"].build(tail, 16, 64, device="cuda").summed()
    k = torch.zeros(1, T, 16, 128, dtype=torch.bfloat16, device="cuda")
    v = torch.zeros(1, T, 64, 128, dtype=torch.bfloat16, device="cuda")
    g, beta = (torch.zeros(1, T, 64, device="cuda") for _ in range(2))
    for big, small in ((k, x.k), (v, x.v), (g, x.g), (beta, x.beta)):
        big[:, -tail:] = small
    w, u, Ai = ops.fwd_intra(k, v, g, beta, return_A=True)
    for big, small in zip((w, u, Ai), run_fwd_intra(x), strict=True):
        assert torch.equal(big[:, -tail:], small)


@pytest.mark.parametrize("n", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
def test_solve_tril(n: int, dtype: torch.dtype, kernels: str) -> None:
    """Against SGLang's separate solve_tril, which its later releases dropped."""
    from sglang.kernels.ops.attention.fla.solve_tril import solve_tril as stock_solve_tril

    for name, case in HARD_INPUTS.items():
        A = case.matrix(n, batch=8).float().transpose(0, 1)[None].contiguous().cuda()
        A = torch.cat([A] * 3, 1)
        truth = naive_solve_tril(A)
        stock = stock_solve_tril(A, output_dtype=dtype)
        stock = torch.where(truth == 0, 0, stock)  # above the diagonal it writes nothing
        bound = tolerance(truth, stock, dtype)
        if dtype == torch.float32:  # at n = 16 SGLang's is plain float32
            bound = max(bound, rounding_bound(n, "tf32x3"))
        assert rel_err(ops.solve_tril(A, output_dtype=dtype), truth) <= bound, name


def test_server_sized_call_against_float64() -> None:
    x = HARD_INPUTS["cosine 0.5"].build(8192, 16, 48, device="cuda").summed()
    w, u, _ = ops.fwd_intra(x.k, x.v, x.g, x.beta)
    W, U, _ = naive_fwd_intra(x.k, x.v, x.g, x.beta)
    assert rel_err(w, W) < 2**-7
    assert rel_err(u, U) < 2**-7
