"""Folders of runs: where the processes of one server write their status files."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from sglang_trinv.errors import TrinvError
from sglang_trinv.status import read_run_dir

KEPT_RUNS = 10


class RunsError(TrinvError):
    """The folder of runs cannot be used, or holds none."""


def runs_root(environ: Mapping[str, str] | None = None) -> Path:
    """Folder of this user's runs."""
    base = (os.environ if environ is None else environ).get("XDG_RUNTIME_DIR")
    parent = Path(base) if base and os.path.isdir(base) else Path(tempfile.gettempdir())
    return parent / f"sglang-trinv-{os.getuid()}"


def new_run_dir(root: Path | None = None) -> Path:
    """Make the folder of a new run, and drop the oldest ones in which no process lives.

    Raises:
        RunsError: the folder belongs to another user, or cannot be written.
    """
    root = root or runs_root()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.stat().st_uid != os.getuid():
            raise RunsError(f"{root} belongs to another user")
        for old in runs(root)[KEPT_RUNS - 1 :]:
            if not living(old):
                shutil.rmtree(old, ignore_errors=True)
        path = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        suffix = 0
        while True:
            try:
                made = path if not suffix else path.with_name(f"{path.name}-{suffix}")
                made.mkdir()
                return made
            except FileExistsError:
                suffix += 1
    except OSError as error:
        raise RunsError(f"no folder for this run in {root}: {error}") from None


def runs(root: Path | None = None) -> list[Path]:
    """Folders of runs, newest first."""
    root = root or runs_root()
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if path.is_dir()), reverse=True)


def living(path: Path) -> bool:
    """Whether a process of the run lives."""
    return any(status["alive"] for status in read_run_dir(path))


def latest_run(root: Path | None = None) -> Path:
    """The newest run with a living process, otherwise the newest.

    Raises:
        RunsError: there has been no run.
    """
    found = runs(root)
    if not found:
        raise RunsError(f"no run in {root or runs_root()}: start one with `sglang-trinv serve`")
    return next((path for path in found if living(path)), found[0])
