"""The grid over chunks: chunk_indices for a ragged batch without reading lengths on the host."""

from __future__ import annotations

import torch

PADDING_CHUNK = 1 << 20  # SGLang's own marker of a padded row of chunk_indices


def chunk_grid(
    T: int, chunk_size: int, cu_seqlens: torch.Tensor | None, chunk_indices: torch.Tensor | None
) -> tuple[int, torch.Tensor | None]:
    """(number of programs along the chunks, chunk_indices [NT, 2] or None)."""
    if cu_seqlens is None:
        return -(-T // chunk_size), None
    if chunk_indices is None:
        chunk_indices = padded_chunk_indices(cu_seqlens, T, chunk_size)
    return chunk_indices.shape[0], chunk_indices


def padded_chunk_indices(cu_seqlens: torch.Tensor, T: int, chunk_size: int) -> torch.Tensor:
    """Rows (sequence, chunk in it) for every chunk, then padding rows (0, 1 << 20).

    The number of chunks depends on the lengths, which live on the device; T // chunk_size plus the
    number of sequences bounds it, so the shape is known on the host and nothing is waited for.
    """
    N = cu_seqlens.numel() - 1
    rows = torch.arange(T // chunk_size + N, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    if N == 0:
        return rows.new_empty(0, 2)
    ends = (cu_seqlens.diff() + chunk_size - 1).div(chunk_size, rounding_mode="floor").cumsum(0)
    ends = ends.to(rows.dtype)
    seq = torch.searchsorted(ends, rows, right=True)
    inside = seq < N
    seq = seq.clamp(max=N - 1)
    starts = torch.nn.functional.pad(ends, (1, 0))[:-1]
    chunk = torch.where(inside, rows - starts[seq], PADDING_CHUNK)
    return (
        torch.stack([torch.where(inside, seq.to(rows.dtype), 0), chunk], 1)
        .to(rows.dtype)
        .contiguous()
    )
