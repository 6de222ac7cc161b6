"""The grid over chunks, from sizes alone: no length is read on the host."""

from __future__ import annotations

import torch

PADDING_CHUNK = 1 << 20  # SGLang's mark of a row of chunk_indices that stands for no chunk


def chunk_grid(
    T: int, chunk_size: int, cu_seqlens: torch.Tensor | None, chunk_indices: torch.Tensor | None
) -> int:
    """Number of programs along the chunks.

    Where a ragged batch comes without chunk_indices, chunk c of sequence n has program
    ``cu_seqlens[n] // chunk_size + n + c``: distinct, below ``T // chunk_size + N``, and found by
    the kernel itself. Programs in between have no chunk.
    """
    if cu_seqlens is None:
        return -(-T // chunk_size)
    if chunk_indices is None:
        N = cu_seqlens.numel() - 1
        return T // chunk_size + N if N else 0
    return chunk_indices.shape[0]
