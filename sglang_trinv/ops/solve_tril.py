"""Host side of the inverse of matrices that lie in memory."""

from __future__ import annotations

import torch

from sglang_trinv.kernels.solve_tril import solve_tril_kernel
from sglang_trinv.ops.check import FLOATS, HALF, check_tensor, check_varlen, want
from sglang_trinv.ops.chunks import chunk_grid
from sglang_trinv.ops.launch import capability
from sglang_trinv.ops.methods import AUTO, dot_precision, implementation
from sglang_trinv.ops.torch_path import solve_tril_torch


def fits_hopper(Ai: torch.Tensor) -> bool:
    """Whether the kernel for Hopper takes the call: chunks of 64, 16-bit results copied by TMA."""
    return (
        Ai.is_cuda
        and capability(Ai.get_device()) == (9, 0)
        and Ai.shape[3] == 64
        and Ai.dtype in HALF
    )


def solve_tril(
    A: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    output_dtype: torch.dtype = torch.float32,
    *,
    chunk_indices: torch.Tensor | None = None,
    method: str = "auto",
) -> torch.Tensor:
    """Invert ``I + A`` in every chunk of ``A``.

    Args:
        A (float32 | bfloat16 | float16, [B, T, H, BT], contiguous): BT is 16, 32 or 64; entries on
            and above the diagonal of each chunk are not used.
        cu_seqlens (int32 | int64, [N + 1], Optional): sequence starts; B must be 1.
        output_dtype (torch.dtype): float32, bfloat16 or float16. Default: float32.
        chunk_indices (like cu_seqlens, [NT, 2], Optional): (sequence, chunk in it); not needed.
        method (str): one of ``METHODS``.
    Returns:
        Ai (output_dtype, [B, T, H, BT]): zeros above the diagonal; every row of every sequence is
            written.
    Raises:
        UnsupportedCall: shape, dtype, device or method outside the above; names the argument.

    Accuracy: docs/numerics.md. One launch, no host synchronisation, graph-capturable.
    Source: unrolled Bunch-Hopcroft doubling (MBH), arXiv 2605.21325.
    """
    check_tensor("A", A, (None, None, None, None), FLOATS)
    B, T, H, BT = A.shape
    want(BT in (16, 32, 64), "A", "a last dimension (chunk size) of 16, 32 or 64", BT)
    want(output_dtype in FLOATS, "output_dtype", "float32, bfloat16 or float16", output_dtype)
    check_varlen(B, cu_seqlens, chunk_indices, A.device)
    if method == "auto" and A.dtype == torch.float32:  # SGLang's is exact before it rounds
        method = "mbh_fp16x2" if output_dtype == torch.bfloat16 else AUTO[torch.float32]
    DOT = dot_precision(method, A.device, output_dtype)
    if implementation(A.device) == "torch":
        return solve_tril_torch(A, cu_seqlens, output_dtype)
    Ai = torch.empty_like(A, dtype=output_dtype)
    NT = chunk_grid(T, BT, cu_seqlens, chunk_indices)
    if NT * H * B == 0:
        return Ai
    if DOT in ("fp16", "fp16x2") and fits_hopper(Ai):
        from sglang_trinv.ops.intra_sm90 import run_solve_tril_sm90

        run_solve_tril_sm90(A, Ai, cu_seqlens, chunk_indices, NT, DOT)
    else:
        solve_tril_kernel[(NT, H, B)](
            A, Ai, cu_seqlens, chunk_indices, T, H=H, BT=BT, DOT=DOT,
            VARLEN=cu_seqlens is not None, num_warps=1, num_stages=1,
        )  # fmt: skip
    return Ai
