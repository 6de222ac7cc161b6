"""One sequence of the whole prefill in two pieces, on two streams."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from sglang_trinv.ops.prefill_sm90 import run_state_sm90

FIRST = 0.5  # share of the first piece


def run_pieces(
    prepare: Callable[[int, int], None], q, k, v, space, o, h, pool, cu_seqlens, scale, T, norm,
    config,
) -> None:  # fmt: skip
    """Run the state pass of one sequence, with ``prepare(begin, end)`` for its slots.

    The pass leaves most multiprocessors idle: what the second piece needs beforehand runs beside
    the first one's pass. The state between them is float32, so the bits are those of one piece.
    """
    slots, H = space.factors.shape[:2]
    middle = int(slots * FIRST)
    between = torch.empty(1, H, v.shape[3], k.shape[3], device=k.device, dtype=torch.float32)
    main, side = torch.cuda.current_stream(), _side_stream(k.get_device())
    rest = (pool, cu_seqlens, scale, T, 1, norm, config)
    prepare(0, middle)
    prepared = main.record_event()
    run_state_sm90(q, k, v, space, o, h, None, *rest, end=middle, ends=between)
    side.wait_event(prepared)  # else both preparations would delay the first pass
    with torch.cuda.stream(side):
        prepare(middle, slots)
    main.wait_event(side.record_event())
    run_state_sm90(q, k, v, space, o, h, between, *rest, begin=middle)


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)
