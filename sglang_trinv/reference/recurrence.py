"""The delta rule token by token in float64: the truth for everything else.

For every token, with ``S`` [V, K] the state of one value head::

    S <- exp(g) S                       decay (KDA: one g for each column)
    S <- S + beta (v - S k) k^T         replace what the state returns for k by v
    o  = scale * S q
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_trinv.reference.exact import matmul
from sglang_trinv.reference.layout import expand_heads, token_ranges

L2NORM_EPS = 1e-6  # as SGLang's l2norm kernels


def naive_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule token by token in float64.

    Args:
        q, k ([B, T, Hg, K]): queries and keys; value head h reads key head h // (H // Hg).
        v ([B, T, H, V]): values.
        g ([B, T, H], Optional): natural log of the decay, before any cumulative sum.
        beta ([B, T, H]): write strength.
        scale (float, Optional): factor of the output. Default: K ** -0.5.
        initial_state ([N, H, V, K], Optional): state before the first token. Default: zeros.
        cu_seqlens ([N + 1], Optional): sequence starts; B must be 1. Default: N = B sequences.
        use_qk_l2norm (bool): divide q and k by sqrt(sum of squares + 1e-6) first.
    Returns:
        o (float64, [B, T, H, V]): zeros at tokens of no sequence.
        final_state (float64, [N, H, V, K]).
    """
    gates = None if g is None else g[..., None]
    return _recurrence(q, k, v, gates, beta, scale, initial_state, cu_seqlens, use_qk_l2norm)


def naive_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run Kimi Delta Attention token by token in float64.

    As ``naive_gated_delta_rule``, but each key channel decays by itself: gk is [B, T, H, K], the
    natural log of the decay before any cumulative sum.
    """
    return _recurrence(q, k, v, gk, beta, scale, initial_state, cu_seqlens, use_qk_l2norm)


def _recurrence(q, k, v, gates, beta, scale, initial_state, cu_seqlens, use_qk_l2norm):
    B, T, H, V = v.shape
    K = k.shape[-1]
    scale = K**-0.5 if scale is None else scale
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    decay = v.new_ones(B, T, H, 1) if gates is None else gates.double().exp()
    ranges = token_ranges(B, T, cu_seqlens)
    q, k = expand_heads(q, H, 2), expand_heads(k, H, 2)
    q, k, v, decay, beta = (x.flatten(0, 1) for x in (q, k, v, decay, beta))

    state = v.new_zeros(len(ranges), H, V, K)
    if initial_state is not None:
        state += initial_state.to(state)
    o = torch.zeros_like(v)
    # Longest first, so that the sequences still running at step t are a leading slice.
    order = sorted(range(len(ranges)), key=lambda n: ranges[n][0] - ranges[n][1])
    state = state[order]
    starts = torch.tensor([ranges[n][0] for n in order], device=v.device)
    lengths = [ranges[n][1] - ranges[n][0] for n in order]
    for t in range(max(lengths, default=0)):
        running = sum(length > t for length in lengths)
        rows = starts[:running] + t
        S = state[:running] * decay[rows][:, :, None, :]
        error = v[rows] - matmul(S, k[rows][..., None])[..., 0]
        S += (beta[rows][..., None] * error)[..., None] * k[rows][:, :, None, :]
        o[rows] = scale * matmul(S, q[rows][..., None])[..., 0]
        state[:running] = S
    final_state = torch.empty_like(state)
    final_state[order] = state
    return o.view(B, T, H, V), final_state


def l2norm(x: Tensor, eps: float = L2NORM_EPS) -> Tensor:
    """x / sqrt(sum of squares over the last dimension + eps)."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
