"""Hold releases against the table, and say what came of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_trinv import targets
from sglang_trinv.compat.checks import CHECKS, Differs, Release
from sglang_trinv.errors import TargetMissing, TrinvError
from sglang_trinv.targets import Target

PLATFORM = "sglang_trinv_cpu_platform"
CHAIN_TIMEOUT_S = 600
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


@dataclass(frozen=True)
class Result:
    """One check: what was found, or what is different."""

    check: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """One release. ``row`` is a release of the table whose row it was held against.

    ``chain`` is what ``chain.main`` prints, with "ok", or None if it was not run.
    """

    release: str
    in_table: bool
    row: str
    results: tuple[Result, ...]
    chain: dict[str, Any] | None

    @property
    def ok(self) -> bool:
        return all(r.ok for r in self.results) and (self.chain is None or self.chain["ok"])

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}

    def detail(self, check: str) -> str:
        return next(r.detail for r in self.results if r.check == check)


def examine(number: str, sources: Path, chain: bool = True) -> Report:
    """Run every check on ``sources``, for a release outside the table against the row that fits
    best, and then the chain if all is as the table says."""
    try:
        row, in_table = targets.find(number), True
    except TargetMissing:
        row, in_table = None, False
    rows = [row] if row else list(reversed(targets.TARGETS))
    tried = [(target, _check(Release(number, sources, target))) for target in rows]
    target, results = max(tried, key=lambda pair: sum(r.ok for r in pair[1]))
    ran = None
    if chain and all(r.ok for r in results):
        ran = run_chain(number, sources, target)
    return Report(number, in_table, target.releases[-1], results, ran)


def _check(release: Release) -> tuple[Result, ...]:
    results = []
    for name, check in CHECKS.items():
        try:
            results.append(Result(name, True, check(release)))
        except (Differs, TrinvError) as error:
            results.append(Result(name, False, str(error)))
    return tuple(results)


def run_chain(number: str, sources: Path, target: Target, fault: str = "") -> dict[str, Any]:
    """``chain.main`` in a process of its own.

    Raises:
        TrinvError: there is no interpreter to run it in.
    """
    if importlib.util.find_spec(PLATFORM) is None:
        raise TrinvError(
            "the chain runs on the distribution sglang-trinv-cpu-platform, which is not installed: "
            "install it, or use --no-chain"
        )
    arguments = [str(sources), number, target.releases[-1], *filter(None, [fault])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "sglang_trinv.compat.chain", *arguments],
        env={"OMP_NUM_THREADS": "1", **os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=CHAIN_TIMEOUT_S,
    )
    lines = done.stdout.strip().splitlines()
    if not lines:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return {"ok": False, "error": said[-1]}
    return {"ok": done.returncode == 0, **json.loads(lines[-1])}


def lines(report: Report) -> list[str]:
    """For a terminal."""
    said = [f"SGLang {report.release}: {_verdict(report)}"]
    said += [f"  {r.check}: {r.detail}" for r in report.results if not r.ok]
    if report.chain is not None and not report.chain["ok"]:
        said.append(f"  chain: {_errors(report.chain)}")
    return said


def _verdict(report: Report) -> str:
    ran = f"; {_errors(report.chain)}" if report.chain and report.chain["ok"] else ""
    if not report.ok:
        return f"not as the table says for {report.row}"
    if report.in_table:
        return f"as the table says{ran}"
    return f"fits the row of {report.row} in sglang_trinv/targets.py, where it can be added{ran}"


def _errors(chain: dict[str, Any]) -> str:
    if "error" in chain:
        return chain["error"]
    return ", ".join(
        f"error of {name} {chain[name]['ours']:.2e} (SGLang's kernels {chain[name]['stock']:.2e})"
        for name in ("o", "state")
    )


def table(reports: list[Report]) -> str:
    """Markdown."""
    rows = [
        "| SGLang | reached by | function replaced | GDN prefill | sources "
        "| chain: error of o, ours / SGLang's | KDA |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        chain = "not run"
        if report.chain is not None and "o" in report.chain:
            errors = report.chain["o"]
            chain = f"{errors['ours']:.2e} / {errors['stock']:.2e}"
            chain += "" if report.chain["ok"] else " (too far)"
        target = targets.find(report.row)
        kda = "refused" if targets.kda_refusal(report.release) else "possible"
        cells = (
            report.release,
            report.detail("entry"),
            f"`{target.module}.{target.function}`",
            report.detail("prefill"),
            "as expected" if all(r.ok for r in report.results) else "differ",
            chain,
            kda,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def write(path: Path, reports: list[Report]) -> None:
    """Replace what stands between the two marks of a Markdown file.

    Raises:
        TrinvError: the file or the marks are missing.
    """
    try:
        text = path.read_text()
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
    except (OSError, ValueError):
        raise TrinvError(
            f"--write: want a file with the lines {BEGIN.strip()} and {END.strip()}, got {path}"
        ) from None
    path.write_text(before + BEGIN + "\n" + table(reports) + "\n" + END + after)
