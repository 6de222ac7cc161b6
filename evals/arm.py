"""One arm: a fresh real server, lm-eval on it, the probe, and the record of what took part."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_trinv.errors import TrinvError
from sglang_trinv.evals import harness, probe, samples
from sglang_trinv.evals.errors import EvalError
from sglang_trinv.evals.plan import PLAIN, Arm, Plan, write_json
from sglang_trinv.evals.probe import Probe
from sglang_trinv.evals.samples import Document
from sglang_trinv.evals.suites import SUITES
from sglang_trinv.serve import health
from sglang_trinv.serve.config import ServeConfig, check, fixed_pools, free_port
from sglang_trinv.serve.launch import Server

START_TIMEOUT_S = 1800.0
SETTLE_S = 3.0  # a status file lags its process

_importing = threading.Lock()


class Stopped(Exception):
    """Another arm failed, or the user interrupts."""


def serve_config(plan: Plan, arm: Arm, shared: bool) -> ServeConfig:
    """The arm's server. Arms differ by kernels, the pinned backend and a fault, by nothing else."""
    flags = ["--linear-attn-prefill-backend", arm.backend, "--random-seed", "0"]
    if not plan.prefix_cache:
        flags.append("--disable-radix-cache")
    if shared:
        flags += fixed_pools(tokens=131072, states=160, share=0.6)
        flags += ("--max-running-requests", "32")
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
    """Start the arm's server, ask it everything, write its records; ``arm.json`` comes last.

    A wrong inverse may leave a server that cannot answer: that is its result, not an error.
    """
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_TRINV")}
    config, ours = serve_config(plan, arm, shared), arm.environ(plan.settings)
    check(config, environ)
    server = Server(config, folder, {**environ, **ours})
    concurrency = concurrency_of(plan, arm)
    record: dict[str, Any] = {
        "kind": arm.kind, "repeat": arm.repeat, "kernels": arm.kernels, "backend": arm.backend,
        "concurrency": concurrency, "environ": ours, "argv": redacted(server.command.argv),
        "versions": versions(), "failed": "",
    }  # fmt: skip

    def alive() -> None:
        if stop.is_set():
            raise Stopped
        server.check_alive()

    def starting(line: str) -> None:
        alive()
        tell(f"starts: {line}")

    with server:
        record["ready_s"] = round(server.wait_healthy(START_TIMEOUT_S, starting), 1)
        verdict = server.verify()
        if arm.kernels == "ours" and verdict.kind != "live":
            raise EvalError(f"our kernels do not serve this model: {verdict.message}")
        before = our_calls(folder)
        try:
            documents, answers = ask(plan, config, folder, concurrency, alive, tell)
        except TrinvError as error:
            if arm.kind in PLAIN:
                raise
            documents, answers = [], None
            record["failed"] = str(error).splitlines()[0].replace(f"{folder}/", "")[:300]
        time.sleep(SETTLE_S)
        statuses = health.schedulers(folder)
        record |= {
            "calls": our_calls(folder) - before, "status": statuses,
            "fallbacks": sum(sum(s["fallbacks"].values()) for s in statuses),
            "server": server_info(config.url), "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
    samples.save(folder / "documents.jsonl", documents)
    if answers:
        answers.save(folder / "probe.npz")
    write_json(folder / "arm.json", record)
    said = record["failed"] or f"{record['calls']} calls of our kernels"
    tell(f"done in {record['seconds']:.0f} s, {said}", True)


def ask(
    plan: Plan,
    config: ServeConfig,
    folder: Path,
    concurrency: int,
    alive: Callable[[], None],
    tell: Callable[..., None],
) -> tuple[list[Document], Probe]:
    """Run lm-eval and the probe on a server that is ready."""
    suite = SUITES[plan.suite]
    harness.run(plan, config.url, folder / "lm_eval", concurrency, alive, tell)
    tell("counts tokens")
    documents = samples.from_lm_eval(folder / "lm_eval", token_counter(plan.model))
    tell("probe")
    texts = probe.choose([d.text for d in documents], suite.probe_documents, suite.probe_characters)
    return documents, probe.run(
        lambda body: health.post(config, "/generate", body, probe.TIMEOUT_S),
        texts, suite.probe_new_tokens, plan.prefix_cache, concurrency,
    )  # fmt: skip


def concurrency_of(plan: Plan, arm: Arm) -> int:
    """Requests at once; half in a repeat, for another order of arrival is part of the noise."""
    found = int(plan.model_args.get("num_concurrent", SUITES[plan.suite].concurrency[plan.device]))
    return max(1, found // 2) if arm.repeat else found


def our_calls(run_dir: Path) -> int:
    """Calls that our kernels answered so far."""
    found = health.schedulers(run_dir)
    return sum(health.calls(found, name) for name in health.IMPLEMENTATION.values())


def token_counter(model: str) -> Callable[[str], int]:
    """Tokens of a text under the model's own tokenizer."""
    with _importing:  # transformers' lazy modules break when two threads import them at once
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
