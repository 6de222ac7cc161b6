"""The command ``study``. Importing this is cheap: it loads what it needs when it runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sglang_trinv.errors import TrinvError

NEEDED = ("jinja2", "matplotlib", "pandas", "pyarrow")
err = Console(stderr=True, highlight=False, soft_wrap=True)


def study(
    quick: Annotated[
        bool, typer.Option("--quick", help="Two sizes, two precisions: under a minute.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda: also measures the kernels.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for tables, figures and report.html.")] = Path(
        "trinv-study"
    ),
    gates: Annotated[
        Path | None, typer.Option(help="Folder with real gates: NAME.npz of g, beta, cu_seqlens.")
    ] = None,
    model: Annotated[
        bool, typer.Option(help="Also run the embedded model with every inverse.")
    ] = True,
    speed: Annotated[
        Path | None, typer.Option(help="JSON of `python -m benchmarks intra`, for one more figure.")
    ] = None,
    served: Annotated[
        list[Path] | None,
        typer.Option(help="report.json of `sglang-trinv eval`, one arm an inverse; repeatable."),
    ] = None,
) -> None:
    """Measure every method of the inverse against float64; write tables, figures, a report."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise TrinvError(f"study: wants {', '.join(missing)}: pip install 'sglang-trinv[study]'")
    if device not in ("cpu", "cuda"):
        raise TrinvError(f"--device: want cpu or cuda, got {device!r}")
    if gates is not None and not gates.is_dir():
        raise TrinvError(f"--gates: want a folder, got {gates}")
    if speed is not None and not speed.is_file():
        raise TrinvError(f"--speed: want a file, got {speed}")
    for path in served or ():
        if not path.is_file():
            raise TrinvError(f"--served: want a file, got {path}")
    if served and not model:
        raise TrinvError("--served: wants the embedded model's keys; leave --no-model out")
    if out.exists() and not out.is_dir():
        raise TrinvError(f"--out: want a folder, got {out}")
    from sglang_trinv.study import run

    report = run.run(run.Options(quick, device, out, gates, model, speed, tuple(served or ())), err)
    typer.echo(f"Report: {report}")
