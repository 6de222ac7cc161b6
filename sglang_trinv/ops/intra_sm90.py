"""The launches of the intra-chunk step for Hopper."""

from __future__ import annotations

import torch

from sglang_trinv.kernels.fwd_intra_sm90 import fwd_intra_kernel_sm90
from sglang_trinv.kernels.inverse_sm90 import inverse_kernel_sm90
from sglang_trinv.kernels.kda_intra_sm90 import kda_intra_kernel_sm90
from sglang_trinv.kernels.solve_tril_sm90 import solve_tril_kernel_sm90
from sglang_trinv.ops.launch import launch
from sglang_trinv.ops.tiles_sm90 import (
    KDA_PROGRAMS,
    KDA_REGS,
    TRIL_REGS,
    WARP_REGS,
    programs,
    rows,
)


def _sequences(cu_seqlens: torch.Tensor | None) -> int:
    return 0 if cu_seqlens is None else cu_seqlens.numel() - 1


def run_intra_sm90(k, v, g, beta, w, u, Ai, cu_seqlens, chunk_indices, NT: int) -> None:
    """As the launch of fwd_intra_kernel in ``fwd_intra._launch``."""
    B, T, Hg, _ = k.shape
    H = beta.shape[2]
    N = _sequences(cu_seqlens)
    varlen = cu_seqlens is not None
    key = (
        k.get_device(), k.dtype, beta.dtype, H, Hg, g is None, varlen and cu_seqlens.dtype,
        chunk_indices is not None and chunk_indices.dtype, Ai is None, beta.data_ptr() % 16 == 0,
        g is None or g.data_ptr() % 16 == 0,
    )  # fmt: skip
    chunks = NT * B
    if v is None:
        launch(
            inverse_kernel_sm90, key, (programs(k.get_device(), chunks * H), 1, 1),
            (rows(k, 64), g, beta, rows(Ai, 64), Ai, None, None, cu_seqlens, chunk_indices, T, N,
             NT, chunks * H, H, Hg, varlen, False, False),
            num_warps=1, maxnreg=WARP_REGS,
        )  # fmt: skip
        return
    few = chunks * H == programs(k.get_device(), chunks * H)
    launch(
        fwd_intra_kernel_sm90, (*key, few, v.stride(1) % 16), (chunks * H, 1, 1),
        (rows(k, 64), rows(v, 64), rows(w, 64), rows(u, 64), None if Ai is None else rows(Ai, 64),
         v, w, u, Ai, g, beta, cu_seqlens, chunk_indices, T, N, NT, v.stride(1), H, Hg, varlen,
         few),
        num_warps=1, maxnreg=WARP_REGS,
    )  # fmt: skip


def run_solve_tril_sm90(A, Ai, cu_seqlens, chunk_indices, NT: int, DOT: str) -> None:
    """As the launch of solve_tril_kernel in ``solve_tril``."""
    B, T, H, _ = A.shape
    varlen = cu_seqlens is not None
    key = (
        A.get_device(), A.dtype, Ai.dtype, H, DOT, varlen and cu_seqlens.dtype,
        chunk_indices is not None and chunk_indices.dtype, A.data_ptr() % 16 == 0,
    )  # fmt: skip
    launch(
        solve_tril_kernel_sm90, key, (NT * B * H, 1, 1),
        (A, rows(Ai, 64), Ai, cu_seqlens, chunk_indices, T, _sequences(cu_seqlens), NT, H, DOT,
         varlen),
        num_warps=1, maxnreg=TRIL_REGS,
    )  # fmt: skip


def run_kda_sm90(
    q, k, v, gk, beta, w, u, kg, Aqk, Akk, cu_seqlens, chunk_indices, scale, NT: int, zeros: bool
) -> None:  # fmt: skip
    """As the launch of kda_intra_kernel in ``kda_intra``."""
    B, T, H, _ = k.shape
    varlen = cu_seqlens is not None
    key = (
        k.get_device(), k.dtype, beta.dtype, H, varlen and cu_seqlens.dtype,
        chunk_indices is not None and chunk_indices.dtype, Akk is None, zeros,
        beta.data_ptr() % 16 == 0,
    )  # fmt: skip
    launch(
        kda_intra_kernel_sm90, key, (programs(k.get_device(), NT * B * H, KDA_PROGRAMS), 1, 1),
        (q, k, v, gk, beta, w, u, kg, Aqk, Akk, cu_seqlens, chunk_indices, scale, T,
         _sequences(cu_seqlens), NT, NT * B * H, H, varlen, zeros),
        num_warps=4, maxnreg=KDA_REGS,
    )  # fmt: skip
