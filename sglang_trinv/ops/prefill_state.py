"""Launches of the state pass of the whole Gated DeltaNet prefill, in one piece or in segments."""

from __future__ import annotations

import torch
import triton.language as tl

from sglang_trinv.kernels.configs import PrefillConfig
from sglang_trinv.kernels.prefill_segments import combine_kernel, transfer_kernel
from sglang_trinv.kernels.prefill_state import state_kernel
from sglang_trinv.ops.fwd_intra import TL_DTYPE
from sglang_trinv.ops.launch import EARLY, launch
from sglang_trinv.ops.methods import interpreted

BV_COMBINE = 16  # rows of the state a program: many small programs, as its steps are few


def run_state(
    q, k, v, space, o, h, pool, cu_seqlens, scale, T: int, N: int, norm, config: PrefillConfig
) -> None:  # fmt: skip
    """Write o, h and the states, from what ``chunk_gated_delta_rule.prepare`` left in ``space``."""
    H, V, K = v.shape[2], v.shape[3], k.shape[3]
    starts = None
    if config.segments > 1:
        starts = torch.empty(N * config.segments, H, V, K, device=k.device, dtype=torch.float32)
        run_segments(k, v, space, starts, pool, cu_seqlens, T, N, config)
    if config.state == "sm90":
        from sglang_trinv.ops.prefill_sm90 import run_state_sm90

        run_state_sm90(
            q, k, v, space, o, h, starts, pool, cu_seqlens, scale, T, N, norm, config
        )  # fmt: skip
        return
    flags = pass_flags(h, starts, pool)
    varlen, io = cu_seqlens is not None, io_dtype(k)
    s_q, s_k, s_v, s_state = q.stride(1), k.stride(1), v.stride(1), slot_stride(pool)
    key = (*call_key(q, k, v, pool, cu_seqlens), flags, config)
    launch(
        state_kernel, key, (V // config.block_v, H, N * config.segments),
        (q, k, v, space.inverses, space.scores, space.factors, o, h, pool.state, pool.indices,
         starts, pool.track, pool.track_chunks, cu_seqlens, T, config.segments, s_q, s_k, s_v,
         s_state, H, k.shape[2], K, V, config.block_v, 64, io, config.stages, varlen, *flags),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def run_segments(k, v, space, starts, pool, cu_seqlens, T: int, N: int, config) -> None:
    """Write ``starts``, the state before each of ``config.segments`` segments of each sequence."""
    G, H, V, K = config.segments, v.shape[2], v.shape[3], k.shape[3]
    ends = torch.empty(N * (G - 1), H, V + K, K, device=k.device, dtype=torch.float32)
    varlen, io = cu_seqlens is not None, io_dtype(k)
    key = call_key(k, k, v, pool, cu_seqlens)
    early = config.state == "sm90"
    if early:
        from sglang_trinv.ops.prefill_sm90 import run_transfer_sm90

        run_transfer_sm90(k, v, space, ends, pool, cu_seqlens, T, N, G)
    else:
        launch(
            transfer_kernel, key, ((V + K) // 64, H, N * (G - 1)),
            (k, v, space.inverses, space.factors, ends, cu_seqlens, T, G, k.stride(1), v.stride(1),
             H, k.shape[2], K, V, 64, io, 2, varlen),
            num_warps=4, num_stages=2,
        )  # fmt: skip
    DOT = "ieee" if interpreted() or torch.version.hip else "tf32x3"
    launch(
        combine_kernel, (key, DOT, early), (V // BV_COMBINE, H, N),
        (ends, starts, pool.state, pool.indices, cu_seqlens, T, G, slot_stride(pool),
         H, K, V, BV_COMBINE, DOT, varlen, pool.state is not None, pool.indices is not None,
         early),
        num_warps=8, num_stages=2, **(EARLY if early else {}),
    )  # fmt: skip


def io_dtype(k: torch.Tensor) -> tl.dtype:
    """The dtype in which blocks are multiplied: the interpreter has no bfloat16 of its own."""
    return tl.float32 if interpreted() else TL_DTYPE[k.dtype]


def pass_flags(h, starts, pool) -> tuple[bool, ...]:
    """HAS_STATE, HAS_INDICES, HAS_STARTS, WRITE_STATE, STORE_H and TRACK of the kernels."""
    return (
        pool.state is not None, pool.indices is not None, starts is not None, pool.write,
        h is not None, pool.track is not None,
    )  # fmt: skip


def call_key(q, k, v, pool, cu_seqlens) -> tuple:
    """What every kernel of the state pass is specialised for (see ``launch``)."""
    state, indices, _, track_chunks, _ = pool
    return (
        k.get_device(), k.dtype, k.shape[2:], v.shape[2:], q.stride(1), k.stride(1), v.stride(1),
        cu_seqlens is None or cu_seqlens.dtype, state is None or (state.dtype, state.stride(0)),
        indices is None or indices.dtype, track_chunks is None or track_chunks.dtype,
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0,
        state is None or state.data_ptr() % 16 == 0,
    )  # fmt: skip


def slot_stride(pool) -> int:
    return 0 if pool.state is None else pool.state.stride(0)
