"""The chunk form of the gated delta rule in float64 (WY representation).

Per chunk and value head, with ``g`` the log decay summed within the chunk::

    A[i, j] = beta_i exp(g_i - g_j) k_i . k_j   for i > j, else 0
    Ai      = (I + A)^-1
    u       = Ai (beta v)
    w       = Ai (beta exp(g) k)

All chunks are one batch: ``[NT, H, BT, ...]`` inside, SGLang's ``[B, T, H, ...]`` outside.
Tokens that belong to no sequence get zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sglang_trinv.reference.exact import matmul
from sglang_trinv.reference.layout import ChunkLayout, expand_heads, token_ranges

CHUNK_SIZE = 64


def chunk_local_cumsum(
    g: Tensor, cu_seqlens: Tensor | None = None, chunk_size: int = CHUNK_SIZE
) -> Tensor:
    """Sum g ([B, T, H] or [B, T, H, K]) along the tokens of each chunk, inclusively; float64."""
    B, T = g.shape[:2]
    layout = ChunkLayout.of(B, T, cu_seqlens, chunk_size, g.device)
    return layout.join(layout.split(g).cumsum(2), B, T)


def naive_chunk_A(
    k: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Compute the strictly lower triangular matrix of every chunk.

    Args:
        k ([B, T, Hg, K]): keys; value head h reads key head h // (H // Hg).
        g ([B, T, H], Optional): log decay summed within the chunk (``chunk_local_cumsum``).
        beta ([B, T, H], Optional): write strength. Default: ones, and H = Hg.
        cu_seqlens ([N + 1], Optional): sequence starts; B must be 1.
    Returns:
        A (float64, [B, T, H, BT]): row t of a chunk is row t of its matrix.
    """
    B, T = k.shape[:2]
    layout = ChunkLayout.of(B, T, cu_seqlens, chunk_size, k.device)
    return layout.join(chunk_A(layout, k, g, beta), B, T)


def naive_solve_tril(A: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Invert ``I + A`` in every chunk of A ([B, T, H, BT]); float64, the same shape.

    Entries of A on and above the diagonal are not read.
    """
    B, T, _, BT = A.shape
    layout = ChunkLayout.of(B, T, cu_seqlens, BT, A.device)
    return layout.join(inverse(layout.split(A)), B, T)


def naive_kkt_solve(
    k: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Compute (I + A)^-1 of every chunk, A as in ``naive_chunk_A``; float64 [B, T, H, BT]."""
    B, T = k.shape[:2]
    layout = ChunkLayout.of(B, T, cu_seqlens, chunk_size, k.device)
    return layout.join(inverse(chunk_A(layout, k, g, beta)), B, T)


def naive_fwd_intra(
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute w ([B, T, H, K]), u ([B, T, H, V]) and Ai ([B, T, H, BT]) in float64.

    Arguments as ``naive_chunk_A``, and v ([B, T, H, V]).
    """
    B, T, H = v.shape[:3]
    layout = ChunkLayout.of(B, T, cu_seqlens, chunk_size, k.device)
    Ai, w, u = _wy(layout, k, v, g, beta, H, inverse)
    return layout.join(w, B, T), layout.join(u, B, T), layout.join(Ai, B, T)


def naive_chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    solve: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the whole layer chunk by chunk in float64.

    Arguments and results as ``naive_gated_delta_rule`` (g is the log decay of each token, not yet
    summed); equal to it in exact arithmetic. ``solve`` takes the place of ``inverse``: from A
    [NT, H, BT, BT] to (I + A)^-1.
    """
    B, T, H, V = v.shape
    K = k.shape[-1]
    scale = K**-0.5 if scale is None else scale
    layout = ChunkLayout.of(B, T, cu_seqlens, chunk_size, k.device)
    gc = torch.zeros_like(beta) if g is None else chunk_local_cumsum(g, cu_seqlens, chunk_size)
    _, w, u = _wy(layout, k, v, gc, beta, H, solve or inverse)
    q, k = (expand_heads(layout.split(x), H, 1) for x in (q, k))
    g_sum = layout.split(g).sum(-1) if g is not None else q.new_zeros(q.shape[:2])
    gc = layout.split(gc)
    attention = matmul(q, k.mT) * _decay(layout, gc)

    state = q.new_zeros(len(token_ranges(B, T, cu_seqlens)), H, V, K)
    if initial_state is not None:
        state += initial_state.to(state)
    o = torch.zeros_like(u)
    steps = int(layout.position.max()) + 1 if layout.number else 0
    for step in range(steps):
        c = torch.nonzero(layout.position == step)[:, 0]
        S = state[layout.sequence[c]]
        v_new = u[c] - matmul(w[c], S.mT)
        before = gc[c].exp()[..., None] * matmul(q[c], S.mT)
        o[c] = scale * (before + matmul(attention[c], v_new))
        k_decayed = k[c] * (g_sum[c][..., None] - gc[c]).exp()[..., None]
        S = g_sum[c].exp()[..., None, None] * S + matmul(v_new.mT, k_decayed)
        state[layout.sequence[c]] = S
    return layout.join(o, B, T), state


def _wy(layout, k, v, g, beta, H, solve):
    """Ai, w, u of every chunk, each [NT, H, BT, ...]."""
    Ai = solve(chunk_A(layout, k, g, beta)).double()
    b_beta = layout.split(beta) if beta is not None else layout.exists[:, None].double()
    kb = expand_heads(layout.split(k), H, 1) * b_beta[..., None]
    if g is not None:
        kb = kb * layout.split(g).exp()[..., None]
    return Ai, matmul(Ai, kb), matmul(Ai, layout.split(v) * b_beta[..., None])


def chunk_A(layout, k, g, beta):
    """A of every chunk, [NT, H, BT, BT]."""
    b_k = layout.split(k)
    A = matmul(b_k, b_k.mT).tril(-1)
    if beta is not None:
        A = expand_heads(A, beta.shape[-1], 1) * layout.split(beta)[..., None]
    if g is not None:
        A = expand_heads(A, g.shape[-1], 1) * _decay(layout, layout.split(g))
    return A


def _decay(layout, g):
    """exp(g_i - g_j) for i >= j where row i exists, else zero; g is [NT, H, BT]."""
    BT = g.shape[-1]
    lower = torch.ones(BT, BT, dtype=torch.bool, device=g.device).tril()
    wanted = lower & layout.exists[:, None, :, None]
    return torch.where(wanted, g[..., :, None] - g[..., None, :], -torch.inf).exp()


def inverse(A: Tensor) -> Tensor:
    """(I + A)^-1 by forward substitution; reads only below the diagonal of A ([..., n, n])."""
    n = A.shape[-1]
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    return torch.linalg.solve_triangular(A.tril(-1), eye, upper=False, unitriangular=True)
