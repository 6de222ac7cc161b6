"""What every op must satisfy, on the CPU in Triton's interpreter and on a GPU alike."""

from __future__ import annotations

from functools import partial

import torch

from sglang_trinv.ops import fwd_intra, kkt_solve
from sglang_trinv.reference.chunk import naive_fwd_intra
from tests.inputs import Inputs, chunk_indices_of, poisoned_allocations
from tests.tolerance import rel_err, stock_emulated, tolerance, worst_chunk_err

NAMES = ("w", "u", "Ai")


def run_fwd_intra(x: Inputs, method: str = "auto", chunk_indices: bool = True) -> tuple:
    """(w, u, Ai) of ``fwd_intra`` into poisoned memory; x.g is summed within the chunks."""
    indices = None
    if chunk_indices and x.cu_seqlens is not None:
        indices = chunk_indices_of(x.cu_seqlens)
    with poisoned_allocations():
        return fwd_intra(
            x.k, x.v, x.g, x.beta, x.cu_seqlens, 64, indices, method=method, return_A=True
        )


def stock_fwd_intra(x: Inputs) -> tuple:
    """SGLang's own kernel where it is installed beside a GPU, its emulation elsewhere."""
    if not x.k.is_cuda:
        return stock_emulated(x.k, x.v, x.g, x.beta, x.cu_seqlens)
    from sglang.kernels.ops.attention.fla.chunk_fwd import chunk_gated_delta_rule_fwd_intra

    indices = None if x.cu_seqlens is None else chunk_indices_of(x.cu_seqlens)
    return chunk_gated_delta_rule_fwd_intra(
        x.k, x.v, x.g, x.beta, x.cu_seqlens, chunk_indices=indices
    )


def check_fwd_intra(x: Inputs, method: str = "auto") -> dict[str, tuple[float, float]]:
    """w, u and Ai within 1.2 times stock's error; Ai of ``kkt_solve`` bitwise the same.

    The worst chunk alone is one draw of the rounding errors for either side: twice stock's there,
    which still finds a single wrong row. Returns {name: (our error, the tolerance)}.
    """
    ours, stock = run_fwd_intra(x, method), stock_fwd_intra(x)
    truth = naive_fwd_intra(x.k, x.v, x.g, x.beta, x.cu_seqlens)
    worst_chunk = partial(worst_chunk_err, cu_seqlens=x.cu_seqlens)
    seen = {}
    for name, a, t, s in zip(NAMES, ours, truth, stock, strict=True):
        assert a.shape == t.shape
        assert a.isfinite().all(), f"{name}: not finite or not written"
        for error, factor in ((rel_err, 1.2), (worst_chunk, 2.0)):
            allowed = tolerance(t, s, a.dtype, factor, error)
            got = error(a, t)
            assert got <= allowed, f"{name}: {error} {got:.3e} is above {allowed:.3e}"
        seen[name] = (rel_err(ours[len(seen)], t), tolerance(t, s, a.dtype))
    Ai = kkt_solve(x.k, x.g, x.beta, x.cu_seqlens, method=method)
    assert torch.equal(Ai, ours[2])
    return seen
