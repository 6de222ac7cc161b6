"""Host side of the whole Gated DeltaNet prefill."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from sglang_trinv.kernels.prefill_prepare import prepare_kernel, scores_kernel
from sglang_trinv.kernels.prefill_state import state_kernel
from sglang_trinv.ops.check import FLOATS, HALF, check_tensor, check_varlen, want
from sglang_trinv.ops.fwd_intra import TL_DTYPE
from sglang_trinv.ops.methods import dot_precision, implementation, interpreted


@dataclass(frozen=True)
class PrefillConfig:
    """How the prefill is cut."""

    state: str = "triton"  # kernel of the state pass: "triton" (any GPU) or "sm90" (Gluon)
    scores: str = (
        "blocks"  # "blocks": with the inverses in one launch; "dense": a launch of its own
    )
    group: int = 1  # value heads a program of the preparation
    block_v: int = 64  # rows of the state a program
    warps: int = 4
    stages: int = 2  # of the loop over chunks ("triton"), of k, v and Ai ("sm90")
    late_stages: int = 1  # of q and P ("sm90")
    maxnreg: int | None = None


SMS = 132  # of H100 and H200


def prefill_config(device: torch.device, programs: int) -> PrefillConfig:
    """For this many groups of 64 state rows; provisional, not measured yet."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return PrefillConfig()
    if programs <= SMS:
        return PrefillConfig(state="sm90", stages=3, late_stages=2)
    return PrefillConfig(state="sm90", maxnreg=128)  # two programs share an SM


@dataclass(frozen=True)
class Workspace:
    """What the first pass leaves for the second; 276 bytes a token and value head in bfloat16."""

    Ai: torch.Tensor  # like k, [slots, H, 64, 64]
    P: torch.Tensor  # like k, [slots, H, 64, 64]
    factors: torch.Tensor  # float32, [slots, H, 4, 64]
    decay: torch.Tensor  # float32, [slots, H]

    @classmethod
    def empty(cls, slots: int, H: int, k: torch.Tensor) -> Workspace:
        return cls(
            k.new_empty(slots, H, 64, 64), k.new_empty(slots, H, 64, 64),
            k.new_empty(slots, H, 4, 64, dtype=torch.float32),
            k.new_empty(slots, H, dtype=torch.float32),
        )  # fmt: skip


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
        config (PrefillConfig, Optional): how to cut the work. Default: by device.
    Returns:
        o (like v, [B, T, H, V]), None, h (like k, [1, NT, H, V, K]) or None: the chunks of all
            sequences in order; NT is an upper bound with cu_seqlens, rows past the last chunk are
            not written. Rows of o beyond the last sequence are not written.
    Raises:
        UnsupportedCall: shape, dtype, device, head_first or method outside the above.

    Two or three launches, no host synchronisation, graph-capturable; workspace: ``Workspace``.
    """
    B, T, H, V = _check(q, k, v, g, beta, cu_seqlens, head_first)
    K = k.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    _check_state(initial_state, initial_state_indices, N, H, V, K, k.device)
    DOT = dot_precision(method, k.device, k.dtype)
    config = config or prefill_config(k.device, N * H * V // 64)
    slots = B * (T // 64 + 1) if cu_seqlens is None else T // 64 + N
    o = torch.empty(B, T, H, V, device=v.device, dtype=v.dtype)
    h = k.new_empty(1, slots, H, V, K) if return_h else None
    if B * T * N == 0:
        return o, None, h
    space = Workspace.empty(slots, H, k)
    norm = use_qk_l2norm_in_kernel
    scale = K**-0.5 if scale is None else scale
    _prepare(q, k, g, beta, space, cu_seqlens, scale, T, N, DOT, norm, config)
    state = (initial_state, initial_state_indices, track_state, track_chunk_idx)
    _run_state(q, k, v, space, o, h, state, cu_seqlens, T, N, inplace_update, config)
    return o, None, h


def _check(q, k, v, g, beta, cu_seqlens, head_first) -> torch.Size:
    want(not head_first, "head_first", "False", head_first)
    for name, x in (("q", q), ("k", k), ("v", v)):
        want(x.dim() == 4, name, "shape [B, T, H, D]", f"shape {list(x.shape)}")
        want(x.dtype in HALF and x.dtype == k.dtype, name, "dtype bfloat16 or float16", x.dtype)
        want(x.stride(3) == 1 and x.stride(2) == x.shape[3], name, "dense heads", x.stride())
        rows = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
        want(rows, name, "rows at one stride", x.stride())
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
    return v.shape


def _check_state(state, indices, N, H, V, K, device) -> None:
    if state is None:
        want(indices is None, "initial_state_indices", "None without initial_state", "a tensor")
        return
    want(state.dtype in FLOATS, "initial_state", "a floating dtype", state.dtype)
    dense = state.shape[1:] == (H, V, K) and state[0].is_contiguous()
    want(dense, "initial_state", f"[slots, {H}, {V}, {K}], slots dense", list(state.shape))
    if indices is not None:
        check_tensor("initial_state_indices", indices, (N,), (torch.int32, torch.int64), device)


def _prepare(q, k, g, beta, space, cu_seqlens, scale, T, N, DOT, norm, config) -> None:
    slots, H = space.decay.shape
    Hg, K = k.shape[2:]
    dense = config.scores == "dense"
    common = {
        "H": H, "Hg": Hg, "K": K, "BN": 64, "IO": _io(k), "VARLEN": cu_seqlens is not None,
        "NORM": norm,
    }  # fmt: skip
    prepare_kernel[(slots, H // config.group, 1 if dense else 2)](
        q, k, g, beta, space.Ai, space.P, space.factors, space.decay, cu_seqlens, scale, T, N,
        q.stride(1), k.stride(1), GROUP=config.group, BK=K, BKQ=32, DOT=DOT, num_warps=1,
        num_stages=1, **common,
    )  # fmt: skip
    if dense:
        scores_kernel[(slots, Hg)](
            q, k, g, space.P, space.factors, cu_seqlens, scale, T, N, q.stride(1), k.stride(1),
            GROUP=H // Hg, num_warps=4, num_stages=1, **common,
        )  # fmt: skip


def _io(k):
    return tl.float32 if interpreted() else TL_DTYPE[k.dtype]


def _run_state(q, k, v, space, o, h, state, cu_seqlens, T, N, inplace, config) -> None:
    pool, indices, track, track_chunks = state
    Hg, K = k.shape[2:]
    H, V = v.shape[2:]
    flags = {
        "H": H, "Hg": Hg, "K": K, "V": V, "VARLEN": cu_seqlens is not None,
        "HAS_STATE": pool is not None, "HAS_INDICES": indices is not None,
        "WRITE_STATE": pool is not None and inplace, "STORE_H": h is not None,
        "TRACK": track is not None,
    }  # fmt: skip
    s_state = 0 if pool is None else pool.stride(0)
    if config.state == "sm90":
        from sglang_trinv.ops.prefill_sm90 import run_state_sm90

        run_state_sm90(q, k, v, space, o, h, state, cu_seqlens, T, N, s_state, flags, config)
        return
    state_kernel[(V // config.block_v, H, N)](
        q, k, v, space.Ai, space.P, space.factors, space.decay, o, h, pool, indices, track,
        track_chunks, cu_seqlens, T, q.stride(1), k.stride(1), v.stride(1), s_state,
        BV=config.block_v, BN=64, IO=_io(k), STAGES=config.stages, num_warps=config.warps,
        num_stages=config.stages, **flags,
    )  # fmt: skip
