"""The whole study: measure, then write tables, figures and the report."""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import sglang_trinv
from sglang_trinv.errors import TrinvError
from sglang_trinv.study import cases, figures, measure, report

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What the command line asks for; ``gates``, ``speed`` and ``served`` are there."""

    quick: bool
    device: str
    out: Path
    gates: Path | None
    model: bool
    speed: Path | None
    served: tuple[Path, ...]


def run(options: Options, console: Console) -> Path:
    """Run the study and return the path of report.html.

    Raises:
        TrinvError: no such device, no transformers for the model's part, gates not as described.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise TrinvError("--device: want cpu, got cuda: torch finds no CUDA device")
    if options.model and importlib.util.find_spec("transformers") is None:
        raise TrinvError("--model: wants transformers; --no-model leaves the model's part out")
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        measured = _measure(options, progress)
    tables = {
        name: pd.DataFrame(rows)
        for name, rows in zip(("study", "model", "served"), measured, strict=True)
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        if len(table):
            table.to_csv(options.out / f"{name}.csv", index=False, float_format="%.4g")
            table.to_parquet(options.out / f"{name}.parquet", index=False)
    summary = report.summary(tables["study"])
    summary.to_csv(options.out / "summary.csv", index=False, float_format="%.3g")
    pictures = figures.draw(**tables, speed=options.speed, out=options.out)
    about = {**provenance(options), "seconds": round(time.monotonic() - started)}
    return report.write(options.out, about, pictures=pictures, **tables)


def _measure(options: Options, progress: Progress) -> tuple[Rows, Rows, Rows]:
    work = measure.work(options.quick)
    embedded, captured = None, []
    if options.model:
        from sglang_trinv.study import model

        embedded = model.Model()
        captured = model.capture(embedded)
    task = progress.add_task("inverses", total=len(work))
    inverses: Rows = []
    for n in dict.fromkeys(size for size, _, _ in work):
        problem = cases.build(n, options.gates, captured, options.device)
        mine = [(method, p) for size, method, p in work if size == n]
        tell = _progress(progress, task, f"inverses, n = {n}")
        for method, precision in tell(mine):
            inverses += measure.emulated(problem, method, precision)
        inverses += measure.compiled(problem)
    if embedded is None:
        return inverses, [], []
    found: Rows = []
    if options.served:
        from sglang_trinv.study import served

        found = [row for path in options.served for row in served.rows(path, captured)]
    task = progress.add_task("model", total=1 + len(list(model.candidates(options.quick))))
    tell = _progress(progress, task, "model")
    return inverses, list(tell(model.drift(embedded, options.quick))), found


def _progress(progress: Progress, task: Any, text: str) -> Callable[[Iterable], Iterable]:
    def through(items: Iterable) -> Iterable:
        progress.update(task, description=text)
        for item in items:
            yield item
            progress.advance(task)

    return through


def provenance(options: Options) -> dict[str, Any]:
    """Versions and the machine, for the report."""
    device = platform.machine()
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
    return {
        "sglang-trinv": sglang_trinv.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "quick": options.quick,
    }
