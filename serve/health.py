"""Is the server ready, and are our kernels live in its scheduler and called?"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sglang_trinv.serve.config import Device, ServeConfig, ServeError
from sglang_trinv.status import read_run_dir

IMPLEMENTATION: dict[Device, str] = {"cuda": "triton", "cpu": "triton-interpreter"}
COUNT_DELAY_S = 10.0  # a status file lags its process by a second, more on a busy machine


@dataclass(frozen=True)
class Verdict:
    """What the status files say about a server."""

    kind: Literal["live", "idle", "off-path", "stock", "error"]
    message: str


def ready(url: str, timeout_s: float = 30.0) -> bool:
    """Whether ``/health`` answers 200. It generates a token, so it is slow on a CPU."""
    try:
        with _direct.open(f"{url}/health", timeout=timeout_s) as answer:
            return answer.status == 200
    except OSError:  # urllib's errors and a refused connection both are
        return False


def post(
    config: ServeConfig, path: str, body: dict[str, Any] | None = None, timeout_s: float = 300.0
) -> Any:
    """POST ``body`` to the server and return its answer: JSON, otherwise text.

    Raises:
        ServeError: no answer, or not 200.
    """
    headers = {"Content-Type": "application/json"}
    if config.api_key:
        headers["Authorization"] = f"Bearer {config.api_key}"
    data = b"" if body is None else json.dumps(body).encode()
    request = urllib.request.Request(config.url + path, data, headers)
    try:
        with _direct.open(request, timeout=timeout_s) as answer:
            text = answer.read().decode()
            return json.loads(text) if answer.headers.get_content_subtype() == "json" else text
    except urllib.error.HTTPError as error:
        text = error.read(300).decode(errors="replace")
        raise ServeError(f"{path}: the server answers {error.code}: {text}") from None
    except OSError as error:
        raise ServeError(f"{path}: the server does not answer: {error}") from None


def short_request(config: ServeConfig) -> None:
    """Send one prompt that no cache holds, so that a prefill must run."""
    body = {
        "text": f"{uuid.uuid4()} are our kernels called?",
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
    }
    post(config, "/generate", body)


def schedulers(run_dir: Path) -> list[dict[str, Any]]:
    """Status of every living scheduler process of a run."""
    return [s for s in read_run_dir(run_dir) if s["role"] == "scheduler" and s["alive"]]


def calls(statuses: list[dict[str, Any]], implementation: str) -> int:
    """Calls that ``implementation`` answered, over all ops and processes."""
    return sum(op[implementation] for status in statuses for op in status["calls"].values())


def verify(
    config: ServeConfig, run_dir: Path, request: Callable[[ServeConfig], None] = short_request
) -> Verdict:
    """Send a short request and read the schedulers' status before and after it."""
    implementation = IMPLEMENTATION[config.device]
    before = calls(schedulers(run_dir), implementation)
    request(config)
    deadline = time.monotonic() + COUNT_DELAY_S
    while True:
        after = schedulers(run_dir)
        new = calls(after, implementation) - before
        verdict = judge(after, config, new)
        if verdict.kind != "error" or time.monotonic() > deadline:
            return verdict
        time.sleep(0.5)


def judge(statuses: list[dict[str, Any]], config: ServeConfig, new_calls: int) -> Verdict:
    """What ``statuses`` say, after a request that raised the counts by ``new_calls``. Pure."""
    implementation = IMPLEMENTATION[config.device]
    if config.kernels == "stock":
        ours = calls(statuses, "triton") + calls(statuses, "triton-interpreter")
        if ours:
            return Verdict("error", f"asked for stock kernels, but ours were called {ours} times")
        return Verdict("stock", "SGLang's own kernels serve (SGLANG_TRINV=0)")
    if not statuses:
        return Verdict("error", "no scheduler process reports: the plugin was not loaded in it")
    for status in statuses:
        state, reason = status["state"], status["reason"]
        if state not in ("installed", "idle"):
            return Verdict("error", f"state {state} in process {status['pid']}: {reason}")
        dead = [hook["target"] for hook in status["hooks"] if not hook["live"]]
        if state == "installed" and (dead or not status["hooks"]):
            return Verdict("error", f"hook not live in process {status['pid']}: {dead or 'none'}")
    if all(status["state"] == "idle" for status in statuses):
        return Verdict("idle", f"nothing to replace, SGLang serves alone: {statuses[0]['reason']}")
    installed = [status for status in statuses if status["state"] == "installed"]
    off = [status for status in installed if not status["on_hot_path"]]
    if off:
        reason = off[0]["reason"] or f"GDN prefill is {off[0]['prefill_backend']}"
        return Verdict("off-path", f"installed but not on the hot path: {reason}")
    plain = calls(installed, "torch")
    if plain:
        return Verdict("error", f"plain torch answered {plain} calls instead of the Triton kernel")
    if new_calls <= 0:
        return Verdict("error", f"a prefill ran and no call by {implementation} was counted")
    total = calls(installed, implementation)
    return Verdict("live", f"{total} calls by {implementation} in {_processes(installed)}")


# A proxy of the environment has no business between us and our own server.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _processes(statuses: list[dict[str, Any]]) -> str:
    return ", ".join(f"{status['role']} {status['pid']}" for status in statuses)
