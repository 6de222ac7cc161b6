"""The status of a server's processes as Prometheus metrics.

The numbers come from the status files, like everything that is shown: there is one count, and it
outlives neither its process nor its server. A reason becomes a label; a process keeps at most 33.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

NAME = "sglang_trinv"
INFO = ("version", "release", "method", "state", "sm", "prefill_backend")


class StatusCollector:
    """A Prometheus collector of what ``read`` returns: the status of each living process."""

    def __init__(self, read: Callable[[], list[dict[str, Any]]]) -> None:
        self.read = read

    def collect(self) -> Iterator[Metric]:
        """Every metric, with the values of now."""
        processes = [(process_name(status), status) for status in self.read()]
        yield from _states(processes)
        yield from _counts(processes)
        yield from _checks(processes)

    def describe(self) -> list[Metric]:
        """Nothing: names need no reading of files when a registry asks for them."""
        return []


def process_name(status: dict[str, Any]) -> str:
    """``scheduler_TP0`` for a process of SGLang's, its role otherwise."""
    return str(status.get("title") or "").removeprefix("sglang::") or str(status["role"])


_Processes = list[tuple[str, dict[str, Any]]]


def _states(processes: _Processes) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        f"{NAME}_info", "What runs in a process; always 1", labels=("process", *INFO)
    )
    live = GaugeMetricFamily(
        f"{NAME}_live", "1 if the hook is live and on the hot path", labels=("process",)
    )
    differ = GaugeMetricFamily(
        f"{NAME}_rank_mismatch", "1 if the ranks run different things", labels=("process",)
    )
    for name, status in processes:
        info.add_metric((name, *(str(status[field] or "") for field in INFO)), 1)
        hooked = bool(status["hooks"]) and all(hook["live"] for hook in status["hooks"])
        live.add_metric((name,), hooked and bool(status["on_hot_path"]))
        differ.add_metric((name,), bool(status.get("mismatch")))
    yield from (info, live, differ)


def _counts(processes: _Processes) -> Iterator[Metric]:
    calls = CounterMetricFamily(
        f"{NAME}_calls", "Calls that the package answered", labels=("process", "op", "by")
    )
    fallbacks = CounterMetricFamily(
        f"{NAME}_fallbacks",
        "Calls that SGLang's own kernels answered",
        labels=("process", "reason"),
    )
    for name, status in processes:
        for op, counts in status["calls"].items():
            for implementation, count in counts.items():
                calls.add_metric((name, op, implementation), count)
        for reason, count in status["fallbacks"].items():
            fallbacks.add_metric((name, reason), count)
    yield from (calls, fallbacks)


def _checks(processes: _Processes) -> Iterator[Metric]:
    checks = CounterMetricFamily(
        f"{NAME}_checks", "Calls compared with SGLang's kernel", labels=("process", "result")
    )
    start = GaugeMetricFamily(
        f"{NAME}_self_check_ratio",
        "Largest error of the start-up self-check, in tolerances; above 1 stock serves",
        labels=("process",),
    )
    for name, status in processes:
        check = status["check"]
        runs = [status.get(name) for name in ("self_check", "self_check_full")]
        for result in ("disagreements", "non_finite", "skipped"):
            checks.add_metric((name, result), check[result])
        checks.add_metric((name, "agreements"), check["done"] - check["disagreements"])
        if any(runs):
            start.add_metric((name,), max(run["worst_ratio"] for run in runs if run))
    yield from (checks, start)
