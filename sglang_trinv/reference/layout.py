"""From packed tokens to chunks of one sequence each, and back.

A chunk never crosses from one sequence to the next: every sequence starts a new chunk, and the
rows of a last chunk beyond its sequence's end do not exist. Here they are filled with zeros, which
is exact: a token with ``k = 0`` and ``beta = 0`` changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def token_ranges(B: int, T: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """First and one-past-last row of every sequence in the flattened ``[B * T]`` tokens."""
    if cu_seqlens is None:
        return [(b * T, (b + 1) * T) for b in range(B)]
    if B != 1:
        raise ValueError(f"B: want 1 with cu_seqlens, got {B}")
    starts = cu_seqlens.tolist()
    if starts[0] < 0 or starts[-1] > T or starts != sorted(starts):
        raise ValueError(f"cu_seqlens: want 0 <= ascending <= {T}, got {starts}")
    return list(zip(starts, starts[1:], strict=False))


@dataclass(frozen=True)
class ChunkLayout:
    """Where the ``NT`` chunks of ``BT`` rows lie in the flattened tokens."""

    rows: Tensor  # [NT, BT] row of each token, 0 where it does not exist
    exists: Tensor  # [NT, BT]
    sequence: Tensor  # [NT] sequence that the chunk belongs to
    position: Tensor  # [NT] number of the chunk within its sequence

    @classmethod
    def of(
        cls, B: int, T: int, cu_seqlens: Tensor | None, chunk_size: int, device: torch.device
    ) -> ChunkLayout:
        ranges = token_ranges(B, T, cu_seqlens)
        counts = [-(-(eos - bos) // chunk_size) for bos, eos in ranges]
        bos = torch.tensor([r[0] for r in ranges], dtype=torch.int64)
        eos = torch.tensor([r[1] for r in ranges], dtype=torch.int64)
        sequence = torch.arange(len(ranges)).repeat_interleave(torch.tensor(counts).long())
        position = torch.tensor([c for n in counts for c in range(n)], dtype=torch.int64)
        rows = (bos[sequence] + position * chunk_size)[:, None] + torch.arange(chunk_size)
        exists = rows < eos[sequence][:, None]
        rows = rows.masked_fill(~exists, 0)
        return cls(*(x.to(device) for x in (rows, exists, sequence, position)))

    @property
    def number(self) -> int:
        return self.rows.shape[0]

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H, ...] -> [NT, H, BT, ...] float64, zeros where the token does not exist."""
        chunks = x.flatten(0, 1)[self.rows].double()
        exists = self.exists.view(*self.exists.shape, *[1] * (chunks.dim() - 2))
        return torch.where(exists, chunks, 0.0).transpose(1, 2)

    def join(self, chunks: Tensor, B: int, T: int) -> Tensor:
        """[NT, H, BT, ...] -> [B, T, H, ...], zeros at tokens of no sequence."""
        chunks = chunks.transpose(1, 2)
        x = chunks.new_zeros(B * T, *chunks.shape[2:])
        x[self.rows[self.exists]] = chunks[self.exists]
        return x.view(B, T, *x.shape[1:])


def expand_heads(x: Tensor, H: int, dim: int) -> Tensor:
    """Repeat the key heads in ``dim`` so that value head h reads key head h // (H // Hg)."""
    Hg = x.shape[dim]
    if H % Hg:
        raise ValueError(f"H: want a multiple of Hg = {Hg}, got {H}")
    return x.repeat_interleave(H // Hg, dim=dim)
