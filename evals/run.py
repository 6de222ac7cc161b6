"""Run a plan's arms, as many side by side as fit; finished ones are not run again."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import psutil
from rich.console import Console

from sglang_trinv.errors import TrinvError
from sglang_trinv.evals.arm import Stopped, run_arm
from sglang_trinv.evals.board import Board
from sglang_trinv.evals.errors import EvalError
from sglang_trinv.evals.plan import Arm, Plan, arms_of

CPU_ARM_BYTES = 5 << 30  # a server and lm-eval in the interpreter
SMALL_MODEL_BYTES = 1 << 30  # such models share a GPU


def run_arms(
    plan: Plan, folder: Path, parallel: int | None, console: Console
) -> list[tuple[Arm, Path]]:
    """Run every arm that is not done; return all of them with their folders.

    Args:
        parallel: servers at once; None: as many as memory and cores allow.
    Raises:
        EvalError: an arm failed; the others are stopped, finished ones stay.
    """
    arms = arms_of(plan.arms)
    folders = [folder / "arms" / arm.name for arm in arms]
    todo = [pair for pair in zip(arms, folders, strict=True) if not finished(*pair, plan)]
    if done := len(arms) - len(todo):
        console.print(f"{done} of {len(arms)} arms are already done in {folder}", markup=False)
    width = parallel or how_many(plan, len(todo) or 1)
    shared = plan.device == "cuda" and small(plan.model) and len(arms) > 1
    stop = threading.Event()
    with (
        Board(console, [arm.name for arm, _ in todo]) as board,
        ThreadPoolExecutor(max(1, width)) as pool,
    ):
        jobs = [pool.submit(_guarded, plan, arm, into, shared, stop, board) for arm, into in todo]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
        finally:  # also on Ctrl-C: every server must be gone before we are
            failed = any(job.done() and job.exception() for job in jobs) or not all(
                job.done() for job in jobs
            )
            if failed:
                stop.set()
                for job in jobs:
                    job.cancel()
    for job in jobs:
        if not job.cancelled() and (error := job.exception()) and not isinstance(error, Stopped):
            raise error
    return list(zip(arms, folders, strict=True))


def finished(arm: Arm, folder: Path, plan: Plan) -> bool:
    """Whether an arm's folder holds a whole run of it."""
    try:
        record = json.loads((folder / "arm.json").read_text())
    except (OSError, ValueError):
        return False
    return record["kind"] == arm.kind and (folder / "documents.jsonl").is_file()


def small(model: str) -> bool:
    """Whether a model folder's weights are so few that several servers share a GPU."""
    folder = Path(model)
    weights = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    return bool(weights) and sum(path.stat().st_size for path in weights) < SMALL_MODEL_BYTES


def how_many(plan: Plan, most: int) -> int:
    """Servers that fit side by side."""
    if plan.device == "cuda":
        return min(most, max(1, (os.cpu_count() or 1) // 2)) if small(plan.model) else 1
    memory = psutil.virtual_memory().available // CPU_ARM_BYTES
    return int(max(1, min(most, os.cpu_count() or 1, memory)))


def _guarded(
    plan: Plan, arm: Arm, folder: Path, shared: bool, stop: threading.Event, board: Board
) -> None:
    """Run one arm; name it in the error."""
    if stop.is_set():
        raise Stopped
    try:
        run_arm(plan, arm, folder, shared, stop, lambda *said: board.tell(arm.name, *said))
    except Stopped:
        raise
    except TrinvError as error:
        board.tell(arm.name, "FAILED", True)
        raise EvalError(f"arm {arm.name}: {error}") from None
    except OSError as error:  # the disk is full, for instance
        raise EvalError(
            f"arm {arm.name}: {error.strerror or error}: {error.filename or folder}"
        ) from None
    except Exception as error:
        raise EvalError(f"arm {arm.name}: {type(error).__name__}: {error}") from error
