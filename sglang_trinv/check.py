"""SGLANG_TRINV_CHECK=N: the first N calls of a process against SGLang's kernel and float64.

For debugging and the demo: the check reads tensor values, so the server waits for it. It works one
key head at a time, which bounds its float64 memory to that share of the call.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from sglang_trinv import status
from sglang_trinv.reference.chunk import naive_fwd_intra, naive_solve_tril
from sglang_trinv.reference.kda import naive_kda_intra
from sglang_trinv.reference.recurrence import naive_gated_delta_rule

logger = logging.getLogger(__name__)

SLACK = 1.2  # times the larger of stock's error and the rounding of the truth to the result's dtype


@dataclass(frozen=True)
class Comparison:
    """Relative Frobenius distances of one result (``w``, ``u``, ``o``, ...) of one call."""

    name: str
    to_stock: float
    ours: float
    stock: float
    rounding: float
    floor: float = 0.0  # what is allowed however small the others are

    @property
    def finite(self) -> bool:
        return math.isfinite(self.ours)

    @property
    def tolerance(self) -> float:
        """A stock result that is not finite sets no limit: then ours only has to be finite."""
        if not math.isfinite(self.stock):
            return math.inf
        return max(SLACK * max(self.stock, self.rounding), self.floor)

    @property
    def agrees(self) -> bool:
        return self.finite and self.ours <= self.tolerance


class _Distance:
    """Relative Frobenius distance, summed over parts of a tensor."""

    def __init__(self) -> None:
        self.difference = self.size = 0.0

    def add(self, x: torch.Tensor, truth: torch.Tensor) -> None:
        truth = truth.double()
        self.difference += (x.double() - truth).square().sum().item()
        self.size += truth.square().sum().item()

    def value(self) -> float:
        if self.size == 0.0:
            return 0.0 if self.difference == 0.0 else math.inf
        return math.sqrt(self.difference / self.size)


class Distances:
    """The four distances of one result, each summed over its parts."""

    def __init__(self) -> None:
        self.to_stock, self.ours, self.stock, self.rounding = (_Distance() for _ in range(4))

    def add(
        self, ours: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """``dtype`` is what the truth may be rounded to. Default: that of ``ours``."""
        self.to_stock.add(ours, stock)
        self.ours.add(ours, truth)
        self.stock.add(stock, truth)
        self.rounding.add(truth.to(dtype or ours.dtype), truth)

    def comparison(self, name: str) -> Comparison:
        parts = self.to_stock, self.ours, self.stock, self.rounding
        return Comparison(name, *(part.value() for part in parts))


def first_calls(
    op: str, call: tuple[Any, ...], result: Any, stock: Callable[..., Any], wanted: int
) -> None:
    """Check this call of ``op`` if fewer than ``wanted`` were checked; never fails the call."""
    process = status.current()
    if not due(wanted):
        return
    if call[0].is_cuda and torch.cuda.is_current_stream_capturing():
        process.record_check(_skip)
        return
    try:
        comparisons = COMPARE[op](call, result, stock(*call))
    except Exception as error:
        logger.warning("sglang_trinv: check skipped: %s: %s", type(error).__name__, error)
        process.record_check(_skip)
        return
    process.record_check(lambda totals: record(totals, comparisons))
    for bad in (c for c in comparisons if not c.agrees):
        logger.warning(
            "sglang_trinv: check: error of %s is %.3g, more than %.3g (SGLang's own kernel: %.3g) "
            "in %s of %s",
            bad.name, bad.ours, bad.tolerance, bad.stock, op, list(call[0].shape),
        )  # fmt: skip


def due(wanted: int) -> bool:
    """Whether this process has checked fewer than ``wanted`` calls."""
    return status.current().check["done"] < wanted


@torch.no_grad()
def compare(
    call: tuple[Any, ...], ours: tuple[Any, ...], stock: tuple[Any, ...]
) -> tuple[Comparison, Comparison]:
    """Distances of w and u of ``ours`` and ``stock`` to the float64 result of ``call``.

    Rows beyond the last sequence belong to nobody: neither kernel defines them.
    """
    k, v, g, beta, cu_seqlens, chunk_size, _ = call
    rows = slice(0, k.shape[1] if cu_seqlens is None else int(cu_seqlens[-1]))
    ratio = v.shape[2] // k.shape[2]
    totals = {name: Distances() for name in "wu"}
    for i_hg in range(k.shape[2]):
        heads = slice(i_hg * ratio, (i_hg + 1) * ratio)
        truth = naive_fwd_intra(
            k[:, rows, i_hg : i_hg + 1],
            v[:, rows, heads],
            None if g is None else g[:, rows, heads],
            None if beta is None else beta[:, rows, heads],
            cu_seqlens,
            chunk_size,
        )
        for i, name in enumerate("wu"):
            totals[name].add(ours[i][:, rows, heads], stock[i][:, rows, heads], truth[i])
    return totals["w"].comparison("w"), totals["u"].comparison("u")


@torch.no_grad()
def compare_solve_tril(
    call: tuple[Any, ...], ours: torch.Tensor, stock: torch.Tensor
) -> tuple[Comparison]:
    """Distances of the inverses ``ours`` and ``stock`` to the float64 one of ``call``."""
    A, cu_seqlens, _ = call
    rows = slice(0, A.shape[1] if cu_seqlens is None else int(cu_seqlens[-1]))
    total = Distances()
    for i_h in range(A.shape[2]):
        head = slice(i_h, i_h + 1)
        truth = naive_solve_tril(A[:, rows, head], cu_seqlens)
        total.add(ours[:, rows, head], stock[:, rows, head], truth)
    return (total.comparison("Ai"),)


@torch.no_grad()
def compare_kda_intra(
    call: tuple[Any, ...], ours: tuple[Any, ...], stock: tuple[Any, ...]
) -> tuple[Comparison, ...]:
    """Distances of w, u and kg of ``ours`` and ``stock`` to the float64 result of ``call``."""
    q, k, v, gk, beta, scale, cu_seqlens, chunk_size, *_ = call
    rows = slice(0, k.shape[1] if cu_seqlens is None else int(cu_seqlens[-1]))
    totals = {name: Distances() for name in KDA}
    for i_h in range(k.shape[2]):
        head = slice(i_h, i_h + 1)
        parts = (x[:, rows, head] for x in (q, k, v, gk, beta))
        truth = naive_kda_intra(*parts, scale, cu_seqlens, chunk_size)
        for name, i in KDA.items():
            truth_i = truth[i - (i > 2)]
            totals[name].add(ours[i][:, rows, head], stock[i][:, rows, head], truth_i)
    return tuple(total.comparison(name) for name, total in totals.items())


@torch.no_grad()
def compare_prefill(
    call: tuple[Any, ...], ours: tuple[Any, ...], stock: tuple[Any, ...]
) -> tuple[Comparison, ...]:
    """Distances of o and the final states of ``ours`` and ``stock`` to the token recurrence.

    Args:
        call: (q, k, v, g, beta, states before, cu_seqlens, which sequences have a state).
        ours, stock: (o, states after), without the states where they were not to be written.
    """
    *tensors, before, starts, kept = call
    truth = naive_gated_delta_rule(*tensors, None, before, starts, use_qk_l2norm=True)
    tokens = kept.repeat_interleave(starts.diff().long())
    parts = [[o[:, : tokens.numel()][:, tokens], *(s[kept] for s in states)]
             for o, *states in (ours, stock, truth)]  # fmt: skip
    return tuple(compared(*x) for x in zip(("o", "state"), *parts, strict=False))


def compared(name: str, ours: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor) -> Comparison:
    """Distances of an output or of states, float32 or not, that come of 16-bit operands.

    Two roundings in a row are always allowed: of one token with one large value they are all of the
    error, and may be at their worst in ours and nothing in stock's.
    """
    dtype = torch.bfloat16 if ours.dtype == torch.float32 else ours.dtype
    total = Distances()
    total.add(ours, stock, truth, dtype)
    return replace(total.comparison(name), floor=torch.finfo(dtype).eps)


KDA = {"w": 0, "u": 1, "kg": 3}  # place in what chunk_kda_fwd_intra returns
COMPARE: dict[str, Callable[..., tuple[Comparison, ...]]] = {
    "fwd_intra": compare,
    "solve_tril": compare_solve_tril,
    "kda_intra": compare_kda_intra,
    "chunk_gated_delta_rule": compare_prefill,
}


def record(totals: dict[str, Any], comparisons: tuple[Comparison, ...]) -> None:
    """Add the comparisons of one call to the ``check`` part of the status."""
    totals["done"] += 1
    totals["disagreements"] += any(not c.agrees for c in comparisons)
    totals["non_finite"] += any(not c.finite for c in comparisons)
    for c in comparisons:
        _raise_to(totals["worst"], c.name, c.to_stock)
        _raise_to(totals["worst_error"]["ours"], c.name, c.ours)
        _raise_to(totals["worst_error"]["stock"], c.name, c.stock)
        ratio = c.ours / c.tolerance if c.tolerance else (math.inf if c.ours else 0.0)
        if math.isfinite(ratio) and ratio >= totals["worst_ratio"]:
            totals["worst_ratio"], totals["tolerance"] = ratio, c.tolerance


def _raise_to(worst: dict[str, float], name: str, value: float) -> None:
    if math.isfinite(value):
        worst[name] = max(worst.get(name, 0.0), value)


def _skip(totals: dict[str, Any]) -> None:
    totals["skipped"] += 1
