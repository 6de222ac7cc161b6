"""Launches of the whole prefill's kernels for Hopper."""

from __future__ import annotations

from typing import Any

from sglang_trinv.kernels.inverse_sm90 import inverse_kernel_sm90
from sglang_trinv.kernels.prefill_state_sm90 import state_kernel_sm90
from sglang_trinv.kernels.prefill_transfer_sm90 import transfer_kernel_sm90
from sglang_trinv.ops.launch import EARLY, launch
from sglang_trinv.ops.prefill_state import call_key, pass_flags, slot_stride
from sglang_trinv.ops.tiles_sm90 import WARP_REGS, Tiles, programs, rows


def workspace(space: Any) -> tuple[Tiles, Tiles | None, Tiles]:
    """inverses and scores in tiles of [64, 64]; factors, six rows a chunk, in tiles of [8, 64]."""
    n = space.factors.shape[0] * space.factors.shape[1]
    return (
        Tiles(space.inverses, [n * 64, 64], [64, 1], [64, 64]),
        None if space.scores is None else Tiles(space.scores, [n * 64, 64], [64, 1], [64, 64]),
        Tiles(space.factors, [n * 6, 64], [64, 1], [8, 64]),
    )


def run_inverse_sm90(k, g, beta, space, cu_seqlens, T, N, norm, beside) -> None:
    """As the launch of inverse_kernel in ``chunk_gated_delta_rule.prepare``, products in fp16."""
    slots, H = space.factors.shape[:2]
    varlen = cu_seqlens is not None
    key = (
        "prefill", k.get_device(), k.dtype, g.dtype, beta.dtype, varlen and cu_seqlens.dtype,
        H, k.shape[2], norm, beside, (g.data_ptr() | beta.data_ptr()) % 16 == 0, k.stride(1),
    )  # fmt: skip
    launch(
        inverse_kernel_sm90, key, (programs(k.get_device(), slots * H), 1, 1),
        (rows(k, 64), g, beta, workspace(space)[0], None, space.factors, space.marks, cu_seqlens,
         None, T, N, T // 64 + 1, slots * H, H, k.shape[2], varlen, norm, beside),
        num_warps=1, maxnreg=WARP_REGS, **EARLY,
    )  # fmt: skip


def run_state_sm90(
    q, k, v, space, o, h, starts, pool, cu_seqlens, scale, T, N, norm, config
) -> None:  # fmt: skip
    """As the launch of state_kernel in ``prefill_state.run_state``."""
    H, V, K = v.shape[2], v.shape[3], k.shape[3]
    G, halves, flags = config.segments, config.block_v // 64, pass_flags(h, starts, pool)
    items = V // config.block_v * H * N * G
    grid = (programs(k.get_device(), items, 1), 1, 1)
    key = (
        *call_key(q, k, v, pool, cu_seqlens), flags, halves, config.stages, config.maxnreg,
        norm, config.own_scores, config.beside,
    )  # fmt: skip
    # With scores_kernel in front nothing starts early: with it 32768 tokens at 16/32 took 767 us on
    # an H200 instead of 741.
    early = config.own_scores or config.beside
    launch(
        state_kernel_sm90, key, grid,
        (rows(q, 64), rows(k, K), rows(v, 64), *workspace(space), rows(o, 64), o,
         h, pool.state, pool.indices, starts, pool.track, pool.track_chunks,
         space.marks, cu_seqlens, scale, T, G, items, slot_stride(pool), H, k.shape[2], K, V,
         halves, config.stages, cu_seqlens is not None, *flags, norm, config.own_scores,
         config.chunks_regs, config.scores_regs, config.beside),
        num_warps=4, maxnreg=config.maxnreg, **(EARLY if early else {}),
    )  # fmt: skip


def run_transfer_sm90(k, v, space, ends, pool, cu_seqlens, T, N, G) -> None:
    """As the launch of transfer_kernel in ``prefill_state.run_segments``."""
    H, V, K = v.shape[2], v.shape[3], k.shape[3]
    inverses, _, factors = workspace(space)
    launch(
        transfer_kernel_sm90, call_key(k, k, v, pool, cu_seqlens), ((V + K) // 64, H, N * (G - 1)),
        (rows(k, K), rows(v, 64), inverses, factors, ends, cu_seqlens, T, G,
         H, k.shape[2], K, V, 3, cu_seqlens is not None),
        num_warps=4, maxnreg=128, **EARLY,
    )  # fmt: skip
