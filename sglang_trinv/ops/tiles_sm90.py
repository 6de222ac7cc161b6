"""Tensor descriptors around the tensors' own memory, for the kernels for Hopper."""

from __future__ import annotations

import functools

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Programs of one warp that an SM holds, for their 25 KB of shared memory, and registers a thread.
WARPS, WARP_REGS = 8, 224
TRIL_REGS = 128  # sixteen programs of solve_tril fit an SM
KDA_PROGRAMS, KDA_REGS = 2, 255  # of four warps an SM, with 97 KB of shared memory each
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


def programs(index: int, tiles: int, per_sm: int = WARPS) -> int:
    """How many programs, of one warp if not said, take the tiles in turns."""
    return min(tiles, _multiprocessors(index) * per_sm)


def idle(index: int, busy: int) -> int:
    """How many multiprocessors are left beside ``busy`` programs, at least one."""
    return max(1, _multiprocessors(index) - busy)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
