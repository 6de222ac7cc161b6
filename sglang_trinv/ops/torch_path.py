"""The ops on CPU tensors without Triton's interpreter: float64 torch, rounded at the end.

For trying code on a laptop. Callers count it as "torch", never as the project's kernels.
"""

from __future__ import annotations

import torch

from sglang_trinv.reference.chunk import naive_fwd_intra, naive_solve_tril
from sglang_trinv.reference.kda import naive_kda_intra


def solve_tril_torch(
    A: torch.Tensor, cu_seqlens: torch.Tensor | None, output_dtype: torch.dtype
) -> torch.Tensor:
    return naive_solve_tril(A, cu_seqlens).to(output_dtype)


def fwd_intra_torch(
    k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, beta: torch.Tensor,
    cu_seqlens: torch.Tensor | None, return_A: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    w, u, Ai = naive_fwd_intra(k, v, g, beta, cu_seqlens)
    return w.to(k.dtype), u.to(v.dtype), Ai.to(k.dtype) if return_A else None


def kda_intra_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gk: torch.Tensor, beta: torch.Tensor,
    scale: float, cu_seqlens: torch.Tensor | None, return_A: bool,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    w, u, kg, Aqk, Akk = (
        x.to(k.dtype) for x in naive_kda_intra(q, k, v, gk, beta, scale, cu_seqlens)
    )
    return w, u, None, kg, Aqk, Akk if return_A else None
