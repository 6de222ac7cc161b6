"""lm-eval as a process of its own: one arm's tasks against one server."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sglang_trinv.evals import tasks as our_tasks
from sglang_trinv.evals.errors import EvalError
from sglang_trinv.evals.plan import Plan
from sglang_trinv.evals.suites import SUITES, own_tasks

STEP = re.compile(r"(Requesting API|Running loglikelihood|Running generate)[^\r\n]*?(\d+)/(\d+)")
HUB_TIMEOUT_S = 5.0
NOISE = ("INFO", "WARNING", "it/s]")


def command(plan: Plan, url: str, folder: Path, concurrency: int) -> list[str]:
    """The command line of lm-eval."""
    suite = SUITES[plan.suite]
    arguments = {
        "model": "tiny" if "," in plan.model else plan.model,
        "tokenizer": plan.model,
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "num_concurrent": concurrency,
        "max_length": suite.max_length,
        "max_retries": 1,
        "timeout": 900,
        **plan.model_args,
    }
    argv = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions",
            "--model_args", ",".join(f"{k}={v}" for k, v in arguments.items()),
            "--tasks", *plan.tasks, "--include_path", str(our_tasks.PATH),
            "--output_path", str(folder), "--log_samples",
            "--seed", "0,1234,1234,1234"]  # fmt: skip
    if plan.limit is not None:
        argv += ["--limit", str(plan.limit)]
    if suite.chat:
        argv += ["--apply_chat_template"]
    if suite.gen_kwargs:
        argv += ["--gen_kwargs", ",".join(f"{k}={v}" for k, v in suite.gen_kwargs.items())]
    if suite.metadata:
        argv += ["--metadata", json.dumps({"tokenizer": plan.model, **suite.metadata})]
    return argv


def environment(offline: bool, environ: Mapping[str, str]) -> dict[str, str]:
    """lm-eval's environment: no proxy before our own server, few threads, the hub if needed."""
    env = {
        **environ,
        "LMEVAL_LOG_LEVEL": "INFO",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    env["NO_PROXY"] = env["no_proxy"] = "127.0.0.1,localhost"
    if offline:
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return env


def run(
    plan: Plan,
    url: str,
    folder: Path,
    concurrency: int,
    check: Callable[[], None],
    progress: Callable[[str], None],
) -> None:
    """Run the plan's tasks; samples go below ``folder``.

    Args:
        check: called twice a second; what it raises ends lm-eval.
        progress: called with what goes on.
    Raises:
        EvalError: lm-eval failed, with the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "lm_eval.log"
    argv = command(plan, url, folder, concurrency)
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=environment(SUITES[plan.suite].offline, os.environ), start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None:
                check()
                progress(latest(log))
                time.sleep(0.5)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if process.returncode:
        check()
        raise EvalError(f"lm-eval ended with status {process.returncode}: {reason(log)}")


def latest(log: Path) -> str:
    """``412/2941 requests`` from lm-eval's progress bars."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        text = file.read().decode(errors="replace")
    found = STEP.findall(text)
    return f"{found[-1][1]}/{found[-1][2]} requests" if found else "loading tasks"


def reason(log: Path) -> str:
    """The line that says why, and where the rest is."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if not any(word in line for word in NOISE)]
    return f"{(said or lines or ['it said nothing'])[-1][:300]} (whole log: {log})"


def check_tasks(tasks: tuple[str, ...]) -> None:
    """Raise EvalError if lm-eval is missing or does not know a task."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise EvalError("lm-eval is not installed: pip install 'sglang-trinv[evals]'") from None
    strange = [task for task in tasks if task not in own_tasks()]
    if not strange:
        return
    from lm_eval.tasks import TaskManager

    known = set(TaskManager(include_path=str(our_tasks.PATH)).all_tasks)
    for task in strange:
        if task not in known:
            raise EvalError(f"--tasks: lm-eval knows no task {task!r}{_similar(task, known)}")


def _similar(task: str, known: set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(task, sorted(known), n=3)
    return f"; similar are {', '.join(close)}" if close else ""


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached; if not, this process stops trying.

    Call it before anything imports the hub's client, which reads the variable once.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    if {"https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"} & os.environ.keys():
        return True  # its own matter
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        with socket.create_connection((host.hostname or "", host.port or 443), HUB_TIMEOUT_S):
            return True
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
        return False


def reachable(plan_tasks: tuple[str, ...], metadata: Mapping[str, Any]) -> tuple[list, dict]:
    """Tasks whose data can be had from here, and of the others why not, by name."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(our_tasks.PATH), metadata=dict(metadata))
    good, bad = [], {}
    for task in plan_tasks:
        try:
            manager.load([task])
        except Exception as error:
            bad[task] = (str(error).splitlines() or [type(error).__name__])[0][:120]
        else:
            good.append(task)
    return good, bad
