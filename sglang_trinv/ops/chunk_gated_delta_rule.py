"""Host side of the whole Gated DeltaNet prefill."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_trinv.kernels.configs import PrefillConfig, inverse_group, prefill_config
from sglang_trinv.kernels.prefill_prepare import inverse_kernel, scores_kernel
from sglang_trinv.ops.check import FLOATS, HALF, check_tensor, check_varlen, want
from sglang_trinv.ops.launch import capability, launch
from sglang_trinv.ops.methods import dot_precision, implementation
from sglang_trinv.ops.prefill_state import io_dtype, run_state

INTS = (torch.int32, torch.int64)


class Workspace(NamedTuple):
    """What is kept for the state pass: 152 bytes a token and value head, with scores 280."""

    inverses: torch.Tensor  # like k, [slots, H, 64, 64]: Ai
    scores: torch.Tensor | None  # likewise: P, where the state pass does not compute it
    factors: torch.Tensor  # float32, [slots, H, 6, 64]: see kernels.prefill_prepare
    marks: torch.Tensor | None  # int32, for Hopper: see kernels.prefill_state_sm90


class Pool(NamedTuple):
    """States that are read and written, all of them optional."""

    state: torch.Tensor | None
    indices: torch.Tensor | None
    track: torch.Tensor | None
    track_chunks: torch.Tensor | None
    write: bool


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    inplace_update: bool = True,
    *,
    method: str = "auto",
    return_h: bool = True,
    track_state: torch.Tensor | None = None,
    track_chunk_idx: torch.Tensor | None = None,
    batch_invariant: bool = False,
    config: PrefillConfig | None = None,
) -> tuple[torch.Tensor, None, torch.Tensor | None]:
    """Run the gated delta rule over whole sequences, chunk by chunk of 64 tokens.

    Args:
        q, k (bfloat16 | float16, [B, T, Hg, K]): queries and keys; heads dense, any token stride.
        v (like k, [B, T, H, V]): values, likewise; value head h uses key head h // (H // Hg).
        g (float32, [B, T, H]): natural log of each token's decay, not summed.
        beta (float32 | like k, [B, T, H]): write strength.
        scale (float, Optional): of the output. Default: K ** -0.5.
        initial_state (float32 | bfloat16 | float16, [slots, H, V, K], Optional): state pool; dense
            but for the slot stride. Updated in place.
        initial_state_indices (int32 | int64, [N], Optional): slot of each sequence; negative: start
            from zeros, write nothing. Default: the sequence's own number.
        cu_seqlens (int32 | int64, [N + 1], Optional): sequence starts; B must be 1.
        head_first (bool): False.
        use_qk_l2norm_in_kernel (bool): divide q and k by sqrt(sum of squares + 1e-6).
        inplace_update (bool): write the final states. Default: True.
        method (str): of the inverse, one of ``METHODS``. Default: "auto".
        return_h (bool): also return the state before each chunk. Default: True.
        track_state (float32, [N, H, V, K], Optional): receives the state before one chunk.
        track_chunk_idx (int32 | int64, [N], Optional): that chunk; outside the sequence: none.
        batch_invariant (bool): the same bits whatever else is in the batch: no segments, whose
            number depends on it, and scores always computed by one kernel. Default: False.
        config (PrefillConfig, Optional): how to cut the work. Default: by device and shape.
    Returns:
        o (like v, [B, T, H, V]), None, h (like k, [1, NT, H, V, K]) or None: the chunks of all
            sequences in order; NT is an upper bound with cu_seqlens, rows past the last chunk are
            not written. Rows of o beyond the last sequence are not written.
    Raises:
        UnsupportedCall: shape, dtype, device, head_first or method outside the above.

    Two launches, one more for scores and two more with segments. No host synchronisation,
    graph-capturable. Workspace: ``Workspace``, with segments K (2 V + K) float32 each for every
    segment and value head.
    """
    if not _plain(q, k, v, g, beta, cu_seqlens, head_first):
        _explain(q, k, v, g, beta, cu_seqlens, head_first)
    B, T, H, V = v.shape
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    pool = Pool(
        initial_state, initial_state_indices, track_state, track_chunk_idx,
        inplace_update and initial_state is not None,
    )  # fmt: skip
    _check_states(pool, N, H, V, k.shape[3], k.device)
    DOT = dot_precision(method, k.device, k.dtype)
    slots = B * (T // 64 + 1) if cu_seqlens is None else T // 64 + N
    o = v.new_empty(B, T, H, V)
    h = k.new_empty(1, slots, H, V, k.shape[3]) if return_h else None
    if B * T * N == 0:
        return o, None, h
    config = config or _config(q, k, v, N, batch_invariant)
    space = Workspace(
        k.new_empty(slots, H, 64, 64),
        None if config.own_scores else k.new_empty(slots, H, 64, 64),
        k.new_empty(slots, H, 6, 64, dtype=torch.float32),
        _marks(k, slots, config, DOT),
    )
    norm = use_qk_l2norm_in_kernel
    scale = k.shape[3] ** -0.5 if scale is None else scale
    prepare(q, k, g, beta, space, cu_seqlens, scale, T, N, DOT, norm, config)
    run_state(q, k, v, space, o, h, pool, cu_seqlens, scale, T, N, norm, config)
    return o, None, h


def _plain(q, k, v, g, beta, cu_seqlens, head_first) -> bool:
    """Whether ``_explain`` would let these arguments pass; this runs before every launch."""
    if v.dim() != 4 or k.dim() != 4 or k.shape != q.shape or k.shape[:2] != v.shape[:2]:
        return False
    B, _, H, V = v.shape
    Hg, K = k.shape[2:]
    return (
        not head_first
        and v.dtype in HALF
        and q.dtype == k.dtype == v.dtype
        and Hg > 0
        and H % Hg == 0
        and K in (64, 128)
        and V % 64 == 0
        and (v.numel() == 0 or (_dense(q) and _dense(k) and _dense(v)))
        and g.shape == beta.shape == v.shape[:3]
        and g.dtype == torch.float32
        and beta.dtype in (torch.float32, k.dtype)
        and g.is_contiguous()
        and beta.is_contiguous()
        and q.device == k.device == v.device == g.device == beta.device
        and (cu_seqlens is None or _plain_starts(cu_seqlens, B, k.device))
        and implementation(k.device) != "torch"
    )


def _dense(x) -> bool:
    stride = x.stride()
    rows = x.shape[0] == 1 or stride[0] == x.shape[1] * stride[1]
    return stride[2] == x.shape[3] and stride[3] == 1 and rows


def _plain_starts(x, B, device) -> bool:
    fits = B == 1 and x.dim() == 1 and x.numel() >= 1 and x.is_contiguous()
    return fits and x.dtype in INTS and x.device == device


def _explain(q, k, v, g, beta, cu_seqlens, head_first) -> None:
    """Raise UnsupportedCall for the first argument that is not as it should be."""
    want(not head_first, "head_first", "False", head_first)
    for name, x in (("q", q), ("k", k), ("v", v)):
        want(x.dim() == 4, name, "shape [B, T, H, D]", f"shape {list(x.shape)}")
        want(x.dtype in HALF and x.dtype == k.dtype, name, "dtype bfloat16 or float16", x.dtype)
        want(x.numel() == 0 or _dense(x), name, "dense heads, rows at one stride", x.stride())
        want(x.device == k.device, name, f"a tensor on {k.device}", f"one on {x.device}")
    B, T, H, V = v.shape
    Hg, K = k.shape[2:]
    want(q.shape == k.shape, "q", f"k's shape {list(k.shape)}", list(q.shape))
    want(k.shape[:2] == v.shape[:2], "k", f"{[B, T]} rows", list(k.shape[:2]))
    want(Hg > 0 and H % Hg == 0, "k", f"a number of heads that divides {H}", Hg)
    want(K in (64, 128), "k", "a last dimension of 64 or 128", K)
    want(V % 64 == 0, "v", "a last dimension that is a multiple of 64", V)
    check_tensor("g", g, (B, T, H), (torch.float32,), k.device)
    check_tensor("beta", beta, (B, T, H), (torch.float32, k.dtype), k.device)
    check_varlen(B, cu_seqlens, None, k.device)
    want(implementation(k.device) != "torch", "k", "a tensor on cuda", k.device)


def _check_states(pool: Pool, N: int, H: int, V: int, K: int, device: torch.device) -> None:
    state, indices = pool.state, pool.indices
    if state is None:
        want(indices is None, "initial_state_indices", "None without initial_state", "a tensor")
    else:
        dense = state.shape[1:] == (H, V, K) and state.stride()[1:] == (V * K, K, 1)
        if not (dense and state.dtype in FLOATS and state.device == device):
            want(state.dtype in FLOATS, "initial_state", "a floating dtype", state.dtype)
            want(state.device == device, "initial_state", f"a tensor on {device}", state.device)
            want(dense, "initial_state", f"[slots, {H}, {V}, {K}], slots dense", list(state.shape))
        if indices is not None:
            check_tensor("initial_state_indices", indices, (N,), INTS, device)
    if pool.track is not None:
        check_tensor("track_state", pool.track, (N, H, V, K), (torch.float32,), device)
        check_tensor("track_chunk_idx", pool.track_chunks, (N,), INTS, device)


def _config(q, k, v, N: int, batch_invariant: bool) -> PrefillConfig:
    B, T, H, V = v.shape
    K = k.shape[3]
    fits = (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0 and K == V == 128
    fits = fits and (q.stride(1) | k.stride(1) | v.stride(1)) % 8 == 0
    found = capability(k.get_device()) if k.is_cuda and fits else (0, 0)
    return prefill_config(
        found, N * H * V // 64, B * T // 64 // N + 1, (V + K) / V, not batch_invariant, N == 1
    )


def _marks(k: torch.Tensor, slots: int, config: PrefillConfig, DOT: str) -> torch.Tensor | None:
    """Marks of the Hopper state pass; its own inverse kernel sets them to zero."""
    if config.state != "sm90":
        return None
    size = 1 + slots * k.shape[2] if config.beside else 1
    return (k.new_empty if DOT == "fp16" else k.new_zeros)(size, dtype=torch.int32)


def prepare(
    q, k, g, beta, space: Workspace, cu_seqlens, scale, T: int, N: int, DOT, norm,
    config: PrefillConfig,
) -> None:  # fmt: skip
    """Fill ``space``: all that needs no state."""
    slots, H = space.factors.shape[:2]
    Hg, K = k.shape[2:]
    varlen, io, s_q, s_k = cu_seqlens is not None, io_dtype(k), q.stride(1), k.stride(1)
    key = (
        k.get_device(), k.dtype, beta.dtype, varlen and cu_seqlens.dtype, H, Hg, K, s_q, s_k, norm,
        (q.data_ptr() | k.data_ptr() | g.data_ptr() | beta.data_ptr()) % 16 == 0,
    )  # fmt: skip
    beside = config.beside
    if config.state == "sm90" and DOT == "fp16":
        from sglang_trinv.ops.prefill_sm90 import run_inverse_sm90

        run_inverse_sm90(k, g, beta, space, cu_seqlens, T, N, norm, beside)
    else:
        group = inverse_group(DOT, H // Hg, slots, Hg)
        launch(
            inverse_kernel, (*key, group, DOT), (slots, H // group, 1),
            (k, g, beta, space.inverses, space.factors, cu_seqlens, T, N, s_k,
             H, Hg, K, group, K, 64, DOT, io, varlen, norm),
            num_warps=1, num_stages=1,
        )  # fmt: skip
    if space.scores is None:
        return
    group = H // Hg
    grid, marks = (slots, Hg, 1), None
    if beside:  # V is K there; the state pass has a multiprocessor for each program
        from sglang_trinv.ops.tiles_sm90 import idle

        grid, marks = (idle(k.get_device(), N * H * K // config.block_v), 1, 1), space.marks
    launch(
        scores_kernel, (*key, beside), grid,
        (q, k, space.scores, space.factors, marks, cu_seqlens, scale, T, N, slots * Hg, s_q, s_k,
         H, Hg, K, group, 64, io, varlen, norm, beside),
        num_warps=8 if beside else 4, num_stages=1,
    )  # fmt: skip
