"""Run a plan's arms: a fresh real server each, lm-eval on it, the probe, the record of it all."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from sglang_trinv.errors import TrinvError
from sglang_trinv.evals import harness, probe, samples
from sglang_trinv.evals.board import Board
from sglang_trinv.evals.errors import EvalError
from sglang_trinv.evals.plan import Arm, Plan, arms_of, write_json
from sglang_trinv.evals.suites import SUITES
from sglang_trinv.serve import health
from sglang_trinv.serve.config import ServeConfig, check, free_port
from sglang_trinv.serve.launch import Server

START_TIMEOUT_S = 1800.0
CPU_ARM_BYTES = 5 << 30  # a server and lm-eval in the interpreter
SMALL_MODEL_BYTES = 1 << 30  # such models share a GPU
# Side by side: pools of a fixed size, and a share that other servers' start cannot disturb.
SHARED_GPU_FLAGS = ("--mem-fraction-static", "0.6", "--max-total-tokens", "131072",
                    "--max-running-requests", "32", "--max-mamba-cache-size", "160")  # fmt: skip
SETTLE_S = 3.0  # a status file lags its process
MEMORY_FLAGS = ("--mem-fraction-static",)


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


class Stopped(Exception):
    """Another arm failed, or the user interrupts."""


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
    except OSError as error:
        raise EvalError(
            f"arm {arm.name}: {error.strerror or error}: {error.filename or folder}"
        ) from None


def serve_config(plan: Plan, arm: Arm, shared: bool) -> ServeConfig:
    """The arm's server. Arms differ by kernels, the pinned backend and a fault, by nothing else."""
    flags = ["--linear-attn-prefill-backend", arm.backend, "--random-seed", "0"]
    if not plan.prefix_cache:
        flags.append("--disable-radix-cache")
    if shared:
        flags += SHARED_GPU_FLAGS
    return ServeConfig(
        model=plan.model, kernels=arm.kernels, device=plan.device, port=free_port(),
        extra=(*flags, *plan.flags),
    )  # fmt: skip


def run_arm(
    plan: Plan,
    arm: Arm,
    folder: Path,
    shared: bool,
    stop: threading.Event,
    tell: Callable[..., None],
) -> None:
    """Start the arm's server, ask it everything, write its records; ``arm.json`` comes last."""
    suite, began = SUITES[plan.suite], time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_TRINV")}
    config = serve_config(plan, arm, shared)
    check(config, environ)
    ours = arm.environ(plan.settings)
    server = Server(config, folder, {**environ, **ours})

    def alive() -> None:
        if stop.is_set():
            raise Stopped
        server.check_alive()

    def starting(line: str) -> None:
        alive()
        tell(f"starts: {line}")

    with server:
        ready_s = server.wait_healthy(START_TIMEOUT_S, starting)
        verdict = server.verify()
        if arm.kernels == "ours" and verdict.kind != "live":
            raise EvalError(f"our kernels do not serve this model: {verdict.message}")
        before = our_calls(folder)
        concurrency = int(plan.model_args.get("num_concurrent", suite.concurrency[plan.device]))
        if arm.repeat:  # another order of arrival: part of the noise that repeats show
            concurrency = max(1, concurrency // 2)
        harness.run(plan, config.url, folder / "lm_eval", concurrency, alive, tell)
        tell("counts tokens")
        documents = samples.from_lm_eval(folder / "lm_eval", token_counter(plan.model))
        tell("probe")
        texts = probe.choose(
            [d.text for d in documents], suite.probe_documents, suite.probe_characters
        )
        answers = probe.run(
            lambda body: health.post(config, "/generate", body, probe.TIMEOUT_S),
            texts, suite.probe_new_tokens, plan.prefix_cache, concurrency,
        )  # fmt: skip
        time.sleep(SETTLE_S)
        statuses = health.schedulers(folder)
        record = {
            "kind": arm.kind, "repeat": arm.repeat, "kernels": arm.kernels,
            "backend": arm.backend, "concurrency": concurrency, "environ": ours,
            "argv": redacted(server.command.argv), "calls": our_calls(folder) - before,
            "fallbacks": sum(sum(s["fallbacks"].values()) for s in statuses),
            "status": statuses, "server": server_info(config.url), "ready_s": round(ready_s, 1),
            "seconds": round(time.monotonic() - began, 1), "versions": versions(),
        }  # fmt: skip
    samples.save(folder / "documents.jsonl", documents)
    answers.save(folder / "probe.npz")
    write_json(folder / "arm.json", record)
    tell(f"done in {record['seconds']:.0f} s, {record['calls']} calls of our kernels", True)


def our_calls(run_dir: Path) -> int:
    """Calls that our kernels answered so far."""
    found = health.schedulers(run_dir)
    return sum(health.calls(found, name) for name in health.IMPLEMENTATION.values())


def token_counter(model: str) -> Callable[[str], int]:
    """Tokens of a text under the model's own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def redacted(argv: tuple[str, ...]) -> list[str]:
    """A command line without an API key."""
    return [
        "***" if before == "--api-key" else "--api-key=***" if a.startswith("--api-key=") else a
        for before, a in zip(("", *argv), argv, strict=False)
    ]


def server_info(url: str) -> dict[str, Any]:
    """The server's settings, those that say what it computes; {} if it does not tell."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for path in ("/server_info", "/get_server_info"):
        try:
            with opener.open(url + path, timeout=30) as answer:
                found = json.loads(answer.read())
        except (OSError, ValueError):
            continue
        return {k: v for k, v in found.items() if isinstance(v, str | int | float | bool | None)
                and "key" not in k}  # fmt: skip
    return {}


def versions() -> dict[str, str]:
    """Releases of what took part."""
    found = {}
    for name in ("sglang", "sglang-trinv", "lm-eval", "torch", "triton", "transformers",
                 "flashinfer-python"):  # fmt: skip
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found
