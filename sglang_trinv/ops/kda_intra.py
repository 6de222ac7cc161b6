"""Host side of the Kimi Delta Attention intra-chunk step."""

from __future__ import annotations

import torch
import triton.language as tl

from sglang_trinv.kernels.configs import kda_intra_config
from sglang_trinv.kernels.kda_intra import kda_intra_kernel
from sglang_trinv.ops.check import HALF, check_tensor, check_varlen, want
from sglang_trinv.ops.chunks import chunk_grid
from sglang_trinv.ops.fwd_intra import TL_DTYPE, fits_hopper, tile
from sglang_trinv.ops.methods import dot_precision, implementation, interpreted
from sglang_trinv.ops.torch_path import kda_intra_torch


def _fits_hopper(q, k, v, gk) -> bool:
    """Whether the kernel for Hopper takes the call: 128 channels, read 16 bytes at once."""
    return fits_hopper(k, v, None) and q.data_ptr() % 16 == 0 == gk.data_ptr() % 16


def chunk_kda_fwd_intra(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gk: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int = 64,
    chunk_indices: torch.Tensor | None = None,
    safe_gate: bool = False,
    fuse_recompute: bool = False,
    fuse_diagonal: bool = False,
    *,
    method: str = "auto",
    return_A: bool | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Compute what Kimi Delta Attention needs inside every chunk of 64 tokens.

    With ``D_ij = exp2(gk_i - gk_j)``, one factor a channel, and sums over the channels::

        Aqk = scale * tril(sum q_i k_j D_ij)
        Akk = (I + strict_tril(beta_i sum k_i k_j D_ij))^-1
        w = Akk (beta exp2(gk) k),  u = Akk (beta v),  kg = exp2(gk_last - gk) k

    Args:
        q, k (bfloat16 | float16, [B, T, H, K], contiguous): normalised; K a multiple of 16.
        v (like k, [B, T, H, V], contiguous): V a multiple of 16.
        gk (float32, [B, T, H, K]): log2 of the decay, summed within the chunk: it never grows
            within a chunk and is never above 0. As steep as it may be.
        beta (float32 | like k, [B, T, H]): write strength.
        scale (float, Optional): factor of Aqk. Default: K ** -0.5.
        cu_seqlens (int32 | int64, [N + 1], Optional): sequence starts; B must be 1.
        chunk_size (int): 64.
        chunk_indices (like cu_seqlens, [NT, 2], Optional): (sequence, chunk in it); rows with a
            chunk beyond their sequence are padding and cost nothing.
        safe_gate (bool): how SGLang computes the diagonal blocks of gates with a lower bound; here
            one way holds for all gates, so it changes nothing.
        fuse_recompute (bool): return None in place of Akk.
        fuse_diagonal (bool): also write the zeros above Aqk's diagonal blocks.
        method (str): one of ``METHODS``. Default: "auto", right for |q|, |k| <= 1 and beta <= 1;
            take an x3 method beyond that.
        return_A (bool, Optional): return Akk. Default: not fuse_recompute.
    Returns:
        w (like k), u (like v), None, kg (like k), Aqk (k's dtype, [B, T, H, 64]), Akk (likewise,
            with zeros above the diagonal) or None. Rows beyond the last sequence are not written.
    Raises:
        UnsupportedCall: shape, dtype, device, chunk size or method outside the above.

    Accuracy: docs/numerics.md. One launch, no host synchronisation, graph-capturable.
    Source: SGLang's chunk_kda_fwd_intra, 0.5.17 and later (contract); MBH, arXiv 2605.21325.
    """
    check_tensor("v", v, (None, None, None, None), HALF)
    B, T, H, V = v.shape
    check_tensor("k", k, (B, T, H, None), (v.dtype,), v.device)
    K = k.shape[3]
    want(chunk_size == 64, "chunk_size", "64", chunk_size)
    want(K > 0 and K % 16 == 0, "k", "a last dimension that is a multiple of 16", K)
    want(V > 0 and V % 16 == 0, "v", "a last dimension that is a multiple of 16", V)
    check_tensor("q", q, tuple(k.shape), (v.dtype,), v.device)
    check_tensor("gk", gk, tuple(k.shape), (torch.float32,), v.device)
    check_tensor("beta", beta, (B, T, H), (torch.float32, v.dtype), v.device)
    check_varlen(B, cu_seqlens, chunk_indices, v.device)
    scale = K**-0.5 if scale is None else scale
    return_A = not fuse_recompute if return_A is None else return_A
    DOT = dot_precision(method, v.device, v.dtype)
    if implementation(v.device) == "torch":
        return kda_intra_torch(q, k, v, gk, beta, scale, cu_seqlens, return_A)
    w, u, kg = torch.empty_like(k), torch.empty_like(v), torch.empty_like(k)
    Aqk = k.new_empty(B, T, H, 64)
    Akk = k.new_empty(B, T, H, 64) if return_A else None
    NT = chunk_grid(T, 64, cu_seqlens, chunk_indices)
    if NT * H * B > 0 and DOT == "fp16" and _fits_hopper(q, k, v, gk):
        from sglang_trinv.ops.intra_sm90 import run_kda_sm90

        run_kda_sm90(
            q, k, v, gk, beta, w, u, kg, Aqk, Akk, cu_seqlens, chunk_indices, float(scale), NT,
            fuse_diagonal,
        )  # fmt: skip
    elif NT * H * B > 0:
        config = kda_intra_config(DOT)
        kda_intra_kernel[(NT, H, B)](
            q, k, v, gk, beta, w, u, kg, Aqk, Akk, cu_seqlens, chunk_indices, scale, -1.0, T,
            H=H, K=K, V=V, BK=tile(K, config.block_k), BDK=tile(K, config.block_d),
            BDV=tile(V, config.block_d), DOT=DOT,
            IO=tl.float32 if interpreted() else TL_DTYPE[k.dtype], STAGES=config.stages,
            VARLEN=cu_seqlens is not None, STORE_A=return_A, ZERO_UPPER=fuse_diagonal,
            num_warps=1, num_stages=1,
        )  # fmt: skip
    return w, u, None, kg, Aqk, Akk
