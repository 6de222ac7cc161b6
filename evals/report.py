"""A result as report.json, a table in the terminal, plots and report.html."""

from __future__ import annotations

import base64
import math
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sglang_trinv.evals import judge
from sglang_trinv.evals.gate import Verdict
from sglang_trinv.evals.judge import Answers, Result
from sglang_trinv.evals.plan import write_json

COLORS = {"EQUIVALENT": "green", "REGRESSION": "red", "INCONCLUSIVE": "yellow", "INVALID": "red"}
TEMPLATE = Path(__file__).with_name("report.html.jinja")
PLOTS = {"forest.png": "Change of the accuracy", "rows.png": "Log-likelihood by chunk row"}


def write(result: Result, answers: list[Answers], folder: Path, console: Console) -> dict[str, Any]:
    """Write all files of a report into ``folder`` and print the table."""
    content = _finite(to_dict(result, answers))
    write_json(folder / "report.json", content)
    plots = draw(content, folder)
    (folder / "report.html").write_text(html(content, plots))
    show(content, console)
    console.print(f"Report: {folder / 'report.html'}", markup=False)
    return content


def to_dict(result: Result, answers: list[Answers]) -> dict[str, Any]:
    """The content of report.json."""
    return {
        "schema": 1,
        "verdict": result.verdict.name,
        "exit_code": int(result.verdict),
        "reasons": result.reasons,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(answers),
        "margins": asdict(result.margins),
        "plan": {**result.plan.model_dump(), "model": Path(result.plan.model).name},
        "comparisons": [
            {
                "name": c.name,
                "baseline": c.baseline.arm.name,
                "candidate": c.candidate.arm.name,
                "expected": c.expected,
                "as_expected": c.as_expected,
                **c.judgement.to_dict(),
            }
            for c in result.comparisons
        ],
        "by_row": judge.noise_by_row(result),
        "arms": [_arm(a) for a in answers],
    }


def machine(answers: list[Answers]) -> dict[str, Any]:
    """Where the servers ran."""
    devices = {
        status["device"] for a in answers for status in a.record["status"] if status.get("device")
    }
    return {"device": sorted(devices), "python": platform.python_version(),
            "versions": answers[0].record["versions"]}  # fmt: skip


def _arm(a: Answers) -> dict[str, Any]:
    kept = ("kind", "kernels", "backend", "environ", "concurrency", "calls", "fallbacks", "ready_s",
            "seconds")  # fmt: skip
    flags = a.record["argv"]
    start = flags.index("--port") + 2 if "--port" in flags else 0
    return {"name": a.arm.name, **{k: a.record[k] for k in kept}, "flags": flags[start:]}


def _finite(x: Any) -> Any:
    """JSON has no infinity: null in its place."""
    if isinstance(x, dict):
        return {k: _finite(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def leading(content: dict[str, Any]) -> dict[str, Any] | None:
    """The comparison to show: "main", in a run without an arm "on" the first of two kinds."""
    kinds = [c for c in content["comparisons"] if not c["name"].startswith("repeat")]
    return next((c for c in kinds if c["name"] == "main"), kinds[0] if kinds else None)


def show(content: dict[str, Any], console: Console) -> None:
    """Print the report."""
    main = leading(content)
    if main and main["tasks"]:
        console.print(task_table(main))
    table = Table(box=None, pad_edge=False)  # narrow: a log's lines have 80 columns
    for name in ("comparison", "verdict", "lost/won", "dLL/token", "|dLL|", "KL", "greedy same"):
        table.add_column(name, justify="left" if name in ("comparison", "verdict") else "right")
    for c in content["comparisons"]:
        color = COLORS[c["verdict"]]
        wrong = "" if c["as_expected"] else " [red](unexpected)[/]"
        table.add_row(escape(f"{c['baseline']} vs {c['candidate']}"),
                      f"[{color}]{c['verdict']}[/]{wrong}", *cells(c))  # fmt: skip
    console.print(table)
    color = COLORS[content["verdict"]]
    console.print(f"[{color}]{content['verdict']}[/]")
    for reason in content["reasons"]:
        console.print(f"  {reason}", markup=False)


def cells(c: dict[str, Any]) -> list[str]:
    """A comparison's numbers."""
    accuracy, ll, probe = c["accuracy"], c["loglikelihood"], c["probe"]
    return [
        f"{accuracy['lost']}/{accuracy['won']} of {accuracy['n']}" if accuracy else "-",
        f"{ll['value']:+.5f}" if ll else "-",
        f"{ll['abs']:.5f}" if ll else "-",
        f"{probe['kl']:.6f}" if probe else "-",
        f"{probe['greedy_same']:.1f}/{probe['greedy_tokens']}" if probe else "-",
    ]


def task_table(main: dict[str, Any]) -> Table:
    """Tasks of the main comparison."""
    table = Table(box=None, pad_edge=False)
    for name in ("task", "n", "off", "on", "lost", "won", "p worse", "Holm", "dLL/token", "|dLL|"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for row in main["tasks"]:
        table.add_row(row["task"], str(row["n"]), *(_number(row.get(k), digits) for k, digits in (
            ("off", 4), ("on", 4), ("lost", 0), ("won", 0), ("p_worse", 3), ("p_worse_holm", 3),
            ("ll_change", 5), ("ll_abs", 5))))  # fmt: skip
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def draw(content: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots that the content has numbers for."""
    import matplotlib as mpl

    mpl.use("Agg")
    from sglang_trinv.evals import plots

    found: list[Path] = []
    main = leading(content)
    if main is None:
        return found
    for name, make in (("forest.png", plots.forest), ("rows.png", plots.rows)):
        figure = make(content, main)
        if figure is not None:
            figure.savefig(folder / name, dpi=110, bbox_inches="tight")
            found.append(folder / name)
    return found


def html(content: dict[str, Any], images: list[Path]) -> str:
    """One page without links to anything else."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pictures = [(PLOTS[path.name], base64.b64encode(path.read_bytes()).decode()) for path in images]
    return environment.from_string(TEMPLATE.read_text()).render(
        r=content, pictures=pictures, cells=cells, color=COLORS, number=_number,
        codes={v.name: int(v) for v in Verdict}, main=leading(content),
    )  # fmt: skip
