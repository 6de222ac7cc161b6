"""Launch of the Hopper state pass: tensor descriptors around the tensors' own memory."""

from __future__ import annotations

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sglang_trinv.kernels.prefill_state_sm90 import state_kernel_sm90

TILE = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
FLAT = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


def rows(x: torch.Tensor, width: int) -> TensorDescriptor:
    """[B, T, H, D] as rows of H * D columns in tiles of [64, width]."""
    B, T, H, D = x.shape
    return TensorDescriptor(x, [B * T, H * D], [x.stride(1), 1], [64, width], TILE)


def run_state_sm90(q, k, v, space, o, h, state, cu_seqlens, T, N, s_state, flags, config) -> None:
    pool, indices, track, track_chunks = state
    K, V, H = k.shape[3], v.shape[3], v.shape[2]
    halves = config.block_v // 64
    tiles = [space.decay.numel() * 64, 64]
    state_kernel_sm90[(V // config.block_v, H, N)](
        rows(q, K), rows(k, K), rows(v, 64),
        TensorDescriptor(space.Ai, tiles, [64, 1], [64, 64], TILE),
        TensorDescriptor(space.P, tiles, [64, 1], [64, 64], TILE),
        TensorDescriptor(space.factors, [space.factors.numel()], [1], [256], FLAT),
        rows(o, 64), space.decay, o, h, pool, indices, track, track_chunks, cu_seqlens, T, s_state,
        HALVES=halves, EARLY=config.stages, LATE=config.late_stages, num_warps=4,
        maxnreg=config.maxnreg, **flags,
    )  # fmt: skip
