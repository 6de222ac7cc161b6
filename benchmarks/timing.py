"""Interleaved timing with a cold L2: on the device alone, and as the host sees it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU here
GHZ = 2.0  # about the highest clock: how many cycles to wait for so many microseconds

Name = TypeVar("Name", bound=Hashable)
Thunk = Callable[[], Any]


def percentiles(samples: list[float]) -> dict[str, float]:
    """median_us, p20_us and p80_us of microseconds."""
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    found = {"median_us": statistics.median(samples), "p20_us": cuts[1], "p80_us": cuts[7]}
    return {name: round(value, 2) for name, value in found.items()}


def measure(
    prepare: dict[Name, Callable[[], Thunk]], rounds: int
) -> dict[Name, dict[str, dict[str, float]]]:
    """Time calls in turns, so that whatever drifts hits all alike.

    Args:
        prepare: for each name a function that returns the call to time; what it does itself (fresh
            metadata, say) is not timed.
        rounds: calls of each on the device and again as many as the host sees them.
    Returns:
        {name: {"device": percentiles, "wall": percentiles}}. Device: between two events around the
        call on the stream, which had a head start, so that launches do not show while kernels,
        and whatever the call makes the GPU wait for, do. Wall: from the call to the end of
        its kernels, on an idle GPU.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    names = list(prepare)
    head_start = {name: _head_start_cycles(prepare[name]) for name in names}
    device: dict[Name, list[float]] = {name: [] for name in names}
    wall: dict[Name, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            device[name].append(_device_us(prepare[name](), flush, head_start[name]))
            wall[name].append(_wall_us(prepare[name](), flush))
    return {
        name: {"device": percentiles(device[name]), "wall": percentiles(wall[name])}
        for name in names
    }


def _device_us(call: Thunk, flush: torch.Tensor, head_start: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(head_start)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3


def _wall_us(call: Thunk, flush: torch.Tensor) -> float:
    flush.zero_()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6


def _head_start_cycles(prepare: Callable[[], Thunk]) -> int:
    """Cycles that cover twice the time in which the host issues a call."""
    issued = []
    for _ in range(10):
        call = prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        issued.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return int((2e6 * max(issued[2:]) + 20) * GHZ * 1e3)


def peak_bytes(call: Thunk) -> int:
    """Most GPU memory that a call holds at once beyond its inputs: its results and workspace."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del results
    return peak


def copy_bandwidth() -> float:
    """Bytes a second that a copy of 1 GiB reads and writes, the best of ten."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * source.numel() / (begin.elapsed_time(end) * 1e-3))
    return best
