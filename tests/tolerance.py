"""How wrong a result may be: judged against float64, never by a hand-picked number.

A result passes if its error is at most 1.2 times the largest of three errors that nobody can blame
it for: rounding the truth to the result's dtype, the error of SGLang's own kernel, and one rounding
of the float32 accumulators. Without the last, Ai of strongly decaying gates (I and entries of 1e-9)
would be wanted to 1e-11. Where no GPU is present ``stock_emulated`` stands for SGLang's kernel: the
same steps and roundings in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sglang_trinv.reference.layout import ChunkLayout, expand_heads
from sglang_trinv.reference.methods import invert

FACTOR = 1.2
FLOAT32_UNIT = 2.0**-24


def rel_err(x: Tensor, ref: Tensor) -> float:
    """Relative Frobenius error of x; NaN if x has a NaN, so that any comparison is False."""
    if x.shape != ref.shape:
        raise ValueError(f"x: want the shape {tuple(ref.shape)}, got {tuple(x.shape)}")
    x, ref = x.double(), ref.double()
    # Scaled, because the squares of numbers beyond 1e154 overflow.
    scale = ref.abs().max().item() if ref.numel() else 0.0
    if scale == 0:
        error = torch.linalg.vector_norm(x).item()
        return error if error == 0 or math.isnan(error) else math.inf
    error = torch.linalg.vector_norm((x - ref) / scale) / torch.linalg.vector_norm(ref / scale)
    return error.item()


def worst_chunk_err(
    x: Tensor, ref: Tensor, cu_seqlens: Tensor | None = None, chunk_size: int = 64
) -> float:
    """The largest ``rel_err`` of one chunk and head of [B, T, H, D]; NaN if x has a NaN.

    Over a whole prefill of 8192 tokens and 32 heads a single row of rubbish changes the Frobenius
    norm by 0.2 %, less than bfloat16 does; in its chunk it changes it by 12 %.
    """
    if x.shape != ref.shape:
        raise ValueError(f"x: want the shape {tuple(ref.shape)}, got {tuple(x.shape)}")
    layout = ChunkLayout.of(*ref.shape[:2], cu_seqlens, chunk_size, ref.device)
    if not layout.number:
        return 0.0
    chunks = layout.split(ref).flatten(2)
    scale = chunks.abs().amax(-1, keepdim=True)
    scale = torch.where(scale == 0, 1.0, scale)
    error = torch.linalg.vector_norm((layout.split(x).flatten(2) - chunks) / scale, dim=-1)
    size = torch.linalg.vector_norm(chunks / scale, dim=-1)
    return torch.where(error == 0, 0.0, error / size).max().item()


def tolerance(
    ref: Tensor,
    stock: Tensor,
    dtype: torch.dtype,
    factor: float = FACTOR,
    error: Callable[[Tensor, Tensor], float] = rel_err,
) -> float:
    """``factor`` times the largest of: rounding the truth to ``dtype``, the stock kernel's error,
    the unit roundoff of float32. NaN, which passes nothing, if one of them is not finite.

    ``error`` is ``rel_err``, or ``worst_chunk_err`` with cu_seqlens bound by functools.partial.
    """
    blameless = (error(ref.to(dtype), ref), error(stock, ref), FLOAT32_UNIT)
    return factor * max(blameless) if all(map(math.isfinite, blameless)) else math.nan


def stock_emulated(
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    merges: str = "tf32rz",
) -> tuple[Tensor, Tensor, Tensor]:
    """SGLang's chunk_gated_delta_rule_fwd_intra with its roundings, in plain torch.

    K K^T and the gates in float32; (I + A)^-1 by float32 substitution on 16 x 16 diagonal blocks
    and merges in this precision (SGLang's tf32), stored in k's dtype; w and u from it and the
    rounded beta v and beta exp(g) k, accumulated in float32. g is summed within each chunk. Rows of
    tokens of no sequence are zero. With float32 merges it equals SGLang's kernel in Triton's
    interpreter but for single roundings.

    Returns:
        w ([B, T, H, K], k.dtype), u ([B, T, H, V], v.dtype), Ai ([B, T, H, BT], k.dtype).
    """
    B, T, H = beta.shape
    layout = ChunkLayout.of(B, T, cu_seqlens, chunk_size, k.device)
    b_k, b_v, b_beta = (layout.split(x).float() for x in (k, v, beta))
    b_g = torch.zeros_like(b_beta) if g is None else layout.split(g).float()
    A = expand_heads((b_k @ b_k.mT).tril(-1), H, 1)
    lower = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=k.device).tril(-1)
    decay = torch.where(lower, b_g[..., :, None] - b_g[..., None, :], -torch.inf)
    # SGLang's safe_exp: a positive difference counts as no coupling at all.
    A = A * torch.where(decay <= 0, decay, -torch.inf).exp() * b_beta[..., None]
    Ai = invert(A, "FS16", merges).to(k.dtype)

    vb = (b_v * b_beta[..., None]).to(v.dtype)
    kb = (expand_heads(b_k, H, 1) * b_beta[..., None] * b_g.exp()[..., None]).to(k.dtype)
    w = (Ai.float() @ kb.float()).to(k.dtype)
    u = (Ai.float() @ vb.float()).to(v.dtype)
    return layout.join(w, B, T), layout.join(u, B, T), layout.join(Ai, B, T)
