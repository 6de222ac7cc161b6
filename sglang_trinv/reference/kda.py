"""The chunk form of Kimi Delta Attention in float64: every key channel decays by itself.

Per chunk and head, with ``g`` the log2 decay summed within the chunk, and sums over the channels::

    Aqk[i, j] = scale sum q_i k_j 2^(g_i - g_j)      for i >= j, else 0
    A[i, j]   = beta_i sum k_i k_j 2^(g_i - g_j)     for i > j, else 0
    Akk = (I + A)^-1,  u = Akk (beta v),  w = Akk (beta 2^g k),  kg = 2^(g_last - g) k

Tokens that belong to no sequence get zeros. ``recurrence.naive_kda`` is the same token by token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_trinv.reference.chunk import CHUNK_SIZE, inverse
from sglang_trinv.reference.exact import matmul
from sglang_trinv.reference.layout import ChunkLayout, token_ranges

AT_ONCE = 1 << 26  # elements of a [chunks, H, BT, BT, K] product in memory: 512 MiB of float64


def naive_kda_intra(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor,
    beta: Tensor,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute w, u, kg, Aqk and Akk in float64.

    Args:
        q, k ([B, T, H, K]), v ([B, T, H, V]), beta ([B, T, H]).
        gk ([B, T, H, K]): log2 of the decay, summed within the chunk.
        scale (float, Optional): factor of Aqk. Default: K ** -0.5.
        cu_seqlens ([N + 1], Optional): sequence starts; B must be 1.
    Returns:
        w, kg (float64, [B, T, H, K]), u ([B, T, H, V]), Aqk and Akk ([B, T, H, BT]).
    """
    B, T = k.shape[:2]
    layout = ChunkLayout.of(B, T, cu_seqlens, chunk_size, k.device)
    parts = _intra(layout, q, k, v, gk, beta, k.shape[-1] ** -0.5 if scale is None else scale)
    w, u, kg, Aqk, Akk = (layout.join(x, B, T) for x in parts)
    return w, u, kg, Aqk, Akk


def naive_kda_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Run the whole layer chunk by chunk in float64, as SGLang does after its intra-chunk step.

    Arguments as ``naive_kda_intra``, and initial_state ([N, H, V, K]).
    Returns:
        o (float64, [B, T, H, V]), final_state (float64, [N, H, V, K]).
    """
    B, T, H, V = v.shape
    K = k.shape[-1]
    scale = K**-0.5 if scale is None else scale
    layout = ChunkLayout.of(B, T, cu_seqlens, chunk_size, k.device)
    w, u, kg, Aqk, _ = _intra(layout, q, k, v, gk, beta, scale)
    g, last = _gates(layout, gk)
    q = layout.split(q) * g.exp2()
    state = q.new_zeros(len(token_ranges(B, T, cu_seqlens)), H, V, K)
    if initial_state is not None:
        state += initial_state.to(state)
    o = torch.zeros_like(u)
    steps = int(layout.position.max()) + 1 if layout.number else 0
    for step in range(steps):
        c = torch.nonzero(layout.position == step)[:, 0]
        S = state[layout.sequence[c]]
        v_new = u[c] - matmul(w[c], S.mT)
        o[c] = scale * matmul(q[c], S.mT) + matmul(Aqk[c], v_new)
        S = last[c].exp2() * S + matmul(v_new.mT, kg[c])
        state[layout.sequence[c]] = S
    return layout.join(o, B, T), state


def _gates(layout: ChunkLayout, gk: Tensor) -> tuple[Tensor, Tensor]:
    """Gates [NT, H, BT, K], rows beyond the end repeating the last, and the last [NT, H, 1, K]."""
    g = layout.split(gk)
    i_last = (layout.exists.sum(1) - 1)[:, None, None, None].expand(-1, g.shape[1], 1, g.shape[3])
    last = g.gather(2, i_last)
    return torch.where(layout.exists[:, None, :, None], g, last), last


def _intra(layout, q, k, v, gk, beta, scale):
    """w, u, kg, Aqk, Akk of every chunk, each [NT, H, BT, ...]."""
    b_q, b_k, b_v, b_beta = (layout.split(x) for x in (q, k, v, beta))
    g, last = _gates(layout, gk)
    Aqk, A = b_k.new_empty(2, *b_k.shape[:3], b_k.shape[2])
    lower = torch.ones(b_k.shape[2], b_k.shape[2], dtype=torch.bool, device=k.device).tril()
    few = max(1, AT_ONCE // (A[0].numel() * k.shape[-1])) if layout.number else 1
    for c in torch.arange(layout.number, device=k.device).split(few):
        difference = g[c][:, :, :, None] - g[c][:, :, None]
        decayed = torch.where(lower[..., None], difference, -torch.inf).exp2() * b_k[c][:, :, None]
        Aqk[c] = scale * matmul(decayed, b_q[c][..., None])[..., 0]
        A[c] = matmul(decayed, b_k[c][..., None])[..., 0].tril(-1)
    Akk = inverse(A * b_beta[..., None])
    kb = b_k * g.exp2() * b_beta[..., None]
    return matmul(Akk, kb), matmul(Akk, b_v * b_beta[..., None]), b_k * (last - g).exp2(), Aqk, Akk
