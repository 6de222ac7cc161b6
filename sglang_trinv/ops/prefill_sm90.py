"""Launches of the Hopper state pass: tensor descriptors around the tensors' own memory."""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sglang_trinv.kernels.prefill_state_sm90 import state_kernel_sm90
from sglang_trinv.kernels.prefill_transfer_sm90 import transfer_kernel_sm90
from sglang_trinv.ops.launch import launch
from sglang_trinv.ops.prefill_state import call_key, pass_flags, slot_stride

TILE = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
FLAT = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


class Tiles(TensorDescriptor):
    """A descriptor without the base class's checks, which take longer than a launch."""

    def __init__(self, base: torch.Tensor, shape: list[int], strides: list[int], tile: list[int]):
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, tile
        self.layout = TILE if tile[0] == 64 else FLAT


def rows(x: torch.Tensor, width: int) -> Tiles:
    """[B, T, H, D] as rows of H * D columns in tiles of [64, width]."""
    B, T, H, D = x.shape
    return Tiles(x, [B * T, H * D], [x.stride(1), 1], [64, width])


def workspace(space: Any) -> tuple[Tiles, Tiles | None, Tiles]:
    """inverses and scores in tiles of [64, 64]; factors, six rows a chunk, in tiles of [8, 64]."""
    n = space.factors.shape[0] * space.factors.shape[1]
    return (
        Tiles(space.inverses, [n * 64, 64], [64, 1], [64, 64]),
        None if space.scores is None else Tiles(space.scores, [n * 64, 64], [64, 1], [64, 64]),
        Tiles(space.factors, [n * 6, 64], [64, 1], [8, 64]),
    )


def run_state_sm90(
    q, k, v, space, o, h, starts, pool, cu_seqlens, scale, T, N, norm, config
) -> None:  # fmt: skip
    """As the launch of state_kernel in ``prefill_state.run_state``."""
    H, V, K = v.shape[2], v.shape[3], k.shape[3]
    G, halves, flags = config.segments, config.block_v // 64, pass_flags(h, starts, pool)
    key = (
        *call_key(q, k, v, pool, cu_seqlens), flags, halves, config.stages, config.maxnreg,
        norm, config.own_scores,
    )  # fmt: skip
    launch(
        state_kernel_sm90, key, (V // config.block_v, H, N * G),
        (rows(q, 64), rows(k, K), rows(v, 64), *workspace(space), rows(o, 64), o,
         h, pool.state, pool.indices, starts, pool.track, pool.track_chunks, cu_seqlens, scale,
         T, G, slot_stride(pool), H, k.shape[2], K, V, halves, config.stages,
         cu_seqlens is not None, *flags, norm, config.own_scores, config.chunks_regs,
         config.scores_regs),
        num_warps=4, maxnreg=config.maxnreg,
    )  # fmt: skip


def run_transfer_sm90(k, v, space, ends, pool, cu_seqlens, T, N, G) -> None:
    """As the launch of transfer_kernel in ``prefill_state.run_segments``."""
    H, V, K = v.shape[2], v.shape[3], k.shape[3]
    inverses, _, factors = workspace(space)
    launch(
        transfer_kernel_sm90, call_key(k, k, v, pool, cu_seqlens), ((V + K) // 64, H, N * (G - 1)),
        (rows(k, K), rows(v, 64), inverses, factors, ends, cu_seqlens, T, G,
         H, k.shape[2], K, V, 3, cu_seqlens is not None),
        num_warps=4, maxnreg=128,
    )  # fmt: skip
