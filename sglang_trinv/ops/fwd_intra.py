"""Host side of the Gated DeltaNet intra-chunk step."""

from __future__ import annotations

import torch
import triton.language as tl

from sglang_trinv.kernels.configs import fwd_intra_config, kkt_solve_config
from sglang_trinv.kernels.fwd_intra import fwd_intra_kernel
from sglang_trinv.ops.check import FLOATS, HALF, check_tensor, check_varlen, want
from sglang_trinv.ops.chunks import chunk_grid
from sglang_trinv.ops.launch import capability
from sglang_trinv.ops.methods import dot_precision, implementation, interpreted
from sglang_trinv.ops.torch_path import fwd_intra_torch

TL_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def fwd_intra(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int = 64,
    chunk_indices: torch.Tensor | None = None,
    *,
    method: str = "auto",
    return_A: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute the WY factors of Gated DeltaNet: ``w = Ai (beta exp(g) k)``, ``u = Ai (beta v)``.

    Ai is the inverse of ``I + strict_tril(beta_i exp(g_i - g_j) k_i . k_j)`` in every chunk of 64.

    Args:
        k (bfloat16 | float16, [B, T, Hg, K], contiguous): keys, normalised; K a multiple of 16.
        v (like k, [B, T, H, V], contiguous): values; V a multiple of 16, H a multiple of Hg.
        g (float32, [B, T, H], Optional): natural log of the decay, summed within the chunk.
        beta (float32 | like k, [B, T, H]): write strength.
        cu_seqlens (int32 | int64, [N + 1], Optional): sequence starts; B must be 1.
        chunk_size (int): 64.
        chunk_indices (like cu_seqlens, [NT, 2], Optional): (sequence, chunk in it).
        method (str): one of ``METHODS``. Default: "auto", right for |k| <= 1, beta <= 1, g <= 0;
            take an x3 method beyond that.
        return_A (bool): also return Ai. Default: False.
    Returns:
        w (like k, [B, T, H, K]), u (like v, [B, T, H, V]), Ai (like k, [B, T, H, 64]) or None.
            Rows beyond the last sequence are not written.
    Raises:
        UnsupportedCall: shape, dtype, device, chunk size or method outside the above.

    Accuracy: docs/numerics.md. One launch, no host synchronisation, graph-capturable.
    Source: SGLang's chunk_gated_delta_rule_fwd_intra (contract); MBH, arXiv 2605.21325 (inverse).
    """
    check_tensor("v", v, (None, None, None, None), HALF)
    B, T, H, V = v.shape
    check_tensor("k", k, (B, T, None, None), (v.dtype,), v.device)
    _check_step(k, g, beta, H, chunk_size)
    want(V > 0 and V % 16 == 0, "v", "a last dimension that is a multiple of 16", V)
    check_varlen(B, cu_seqlens, chunk_indices, v.device)
    DOT = dot_precision(method, v.device, v.dtype)
    if implementation(v.device) == "torch":
        return fwd_intra_torch(k, v, g, beta, cu_seqlens, return_A)
    w, u = v.new_empty(B, T, H, k.shape[3]), torch.empty_like(v)
    Ai = v.new_empty(B, T, H, 64) if return_A else None
    _launch(k, v, g, beta, w, u, Ai, cu_seqlens, chunk_indices, DOT)
    return w, u, Ai


def kkt_solve(
    k: torch.Tensor,
    g: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int = 64,
    chunk_indices: torch.Tensor | None = None,
    *,
    output_dtype: torch.dtype | None = None,
    method: str = "auto",
) -> torch.Tensor:
    """Compute ``(I + strict_tril(beta_i exp(g_i - g_j) k_i . k_j))^-1`` in every chunk of 64.

    Args, errors and accuracy: as ``fwd_intra``; output_dtype (float32, bfloat16 or float16) is k's
    dtype by default.
    Returns:
        Ai (output_dtype, [B, T, H, 64]): zeros above the diagonal.
    """
    check_tensor("k", k, (None, None, None, None), HALF)
    B, T = k.shape[:2]
    want(
        isinstance(beta, torch.Tensor) and beta.dim() == 3,
        "beta",
        "a [B, T, H] tensor",
        _kind(beta),
    )
    _check_step(k, g, beta, beta.shape[2], chunk_size)
    check_varlen(B, cu_seqlens, chunk_indices, k.device)
    output_dtype = output_dtype or k.dtype
    want(output_dtype in FLOATS, "output_dtype", "float32, bfloat16 or float16", output_dtype)
    DOT = dot_precision(method, k.device, output_dtype)
    if implementation(k.device) == "torch":
        v = k.new_zeros(B, T, beta.shape[2], 16)
        return fwd_intra_torch(k, v, g, beta, cu_seqlens, True)[2].to(output_dtype)
    Ai = k.new_empty(B, T, beta.shape[2], 64, dtype=output_dtype)
    _launch(k, None, g, beta, None, None, Ai, cu_seqlens, chunk_indices, DOT)
    return Ai


def _check_step(
    k: torch.Tensor, g: torch.Tensor | None, beta: torch.Tensor | None, H: int, chunk_size: int
) -> None:
    B, T, Hg, K = k.shape
    want(chunk_size == 64, "chunk_size", "64", chunk_size)
    want(K > 0 and K % 16 == 0, "k", "a last dimension that is a multiple of 16", K)
    want(Hg > 0 and H % Hg == 0, "k", f"a number of key heads that divides {H} value heads", Hg)
    check_tensor("beta", beta, (B, T, H), (torch.float32, k.dtype), k.device)
    if g is not None:
        check_tensor("g", g, (B, T, H), (torch.float32,), k.device)


def _kind(x: object) -> str:
    return f"shape {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__


def tile(size: int, most: int) -> int:
    """The widest power of two up to ``most`` that divides ``size``."""
    return min(most, size & -size)


def fits_hopper(k: torch.Tensor, v: torch.Tensor | None, Ai: torch.Tensor | None) -> bool:
    """Whether the kernel for Hopper takes the call: its tiles have 128 columns, copied by TMA."""
    tensors = [x for x in (k, v, Ai) if x is not None]
    return (
        k.is_cuda
        and capability(k.get_device()) == (9, 0)
        and k.shape[3] == 128 == (128 if v is None else v.shape[3])
        and all(x.dtype == k.dtype and x.data_ptr() % 16 == 0 for x in tensors)
    )


def _launch(k, v, g, beta, w, u, Ai, cu_seqlens, chunk_indices, DOT):
    B, T, Hg, K = k.shape
    H = beta.shape[2]
    V = v.shape[3] if v is not None else 16
    NT = chunk_grid(T, 64, cu_seqlens, chunk_indices)
    if NT * H * B == 0:
        return
    if DOT == "fp16" and fits_hopper(k, v, Ai):
        from sglang_trinv.ops.intra_sm90 import run_intra_sm90

        run_intra_sm90(k, v, g, beta, w, u, Ai, cu_seqlens, chunk_indices, NT)
        return
    config = kkt_solve_config(H // Hg, NT * B, Hg) if v is None else fwd_intra_config(DOT)
    fwd_intra_kernel[(NT, H // config.group, B)](
        k, v, g, beta, w, u, Ai, cu_seqlens, chunk_indices, T, H=H, Hg=Hg, K=K, V=V,
        GROUP=config.group, BK=tile(K, config.block_k), BDK=tile(K, config.block_d),
        BDV=tile(V, config.block_d), DOT=DOT,
        IO=tl.float32 if interpreted() else TL_DTYPE[k.dtype], STAGES=config.stages,
        HAS_G=g is not None, VARLEN=cu_seqlens is not None, STORE_A=Ai is not None,
        STORE_WU=v is not None, num_warps=1, num_stages=1,
    )  # fmt: skip
