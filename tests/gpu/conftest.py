"""`--gpu-report FILE`: what ran on which GPU with which result, as JSON to commit."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime import Autotuner, Heuristics

STOCK_MODULES = ("chunk_fwd", "chunk_intra", "chunk_intra_token_parallel", "kda")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", metavar="FILE", help="write outcomes and provenance as JSON")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--gpu-report")
    if path and not hasattr(config, "workerinput"):  # a worker of pytest-xdist reports to the first
        config.pluginmanager.register(Report(Path(path), config.args), "gpu-report")


@pytest.fixture(scope="session", autouse=True)
def one_configuration_of_stock() -> None:
    """SGLang's kernels in one configuration each; only their speed differs, and tuning is slow."""
    for name in STOCK_MODULES:
        with suppress(ImportError):
            module = importlib.import_module(f"sglang.kernels.ops.attention.fla.{name}")
            for kernel in vars(module).values():
                tuned = kernel.fn if isinstance(kernel, Heuristics) else kernel
                if isinstance(tuned, Autotuner):
                    tuned.configs = tuned.configs[-1:]


class Report:
    """Collects one row a test."""

    def __init__(self, path: Path, selected: list[str]) -> None:
        self.path = path
        self.selected = selected
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.rows.append(
                {
                    "test": report.nodeid,
                    "outcome": report.outcome,
                    "seconds": round(report.duration, 2),
                    **dict(report.user_properties),
                }
            )

    def pytest_sessionfinish(self) -> None:
        outcomes = [row["outcome"] for row in self.rows]
        found = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "argv": ["pytest", *self.selected],
            "commit": commit(),
            "versions": versions(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "counts": {o: outcomes.count(o) for o in sorted(set(outcomes))},
            "tests": self.rows,
        }
        self.path.write_text(json.dumps(found, indent=1) + "\n")


def commit() -> str:
    """The checkout's commit; the file COMMIT names it where the sources came without git."""
    if Path("COMMIT").is_file():
        return Path("COMMIT").read_text().strip()
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    import importlib.metadata

    import triton

    import sglang_trinv

    try:
        sglang = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        sglang = "its fla kernels alone"
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sglang": sglang,
        "sglang_trinv": sglang_trinv.__version__,
    }
