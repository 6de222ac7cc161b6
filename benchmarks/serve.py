"""Time to first token and prefill rate of whole servers, measured by SGLang's own client.

The servers of all arms run side by side on one GPU and are asked in turns, one at a time, so that
whatever drifts hits all alike; the others are idle. Radix cache off, one new token, so a request is
a prefill. An arm that cannot be served is recorded with the reason. On a GPU one prefill of each
arm is profiled at the end, after everything is measured.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from benchmarks import output, serve_models, serve_profile, serve_report
from benchmarks.serve_client import Client
from benchmarks.serve_report import GOAL_TOKENS
from sglang_trinv import runs
from sglang_trinv.serve import config as serve_config
from sglang_trinv.serve import health
from sglang_trinv.serve.config import ServeConfig, ServeError
from sglang_trinv.serve.launch import Server

# Arm: kernels, GDN prefill backend of SGLang, SGLANG_TRINV_GDN
ARMS = {
    "triton": ("stock", "triton", ""),
    "flashinfer": ("stock", "flashinfer", ""),
    "intra": ("ours", "triton", "intra"),
    "full": ("ours", "triton", "full"),
}
LENGTHS = (2048, 8192, 32768)
CONCURRENCY = (1, 16)
START_TIMEOUT_S = 240.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    model: str
    arms: tuple[str, ...]
    lengths: tuple[int, ...] = LENGTHS
    concurrency: tuple[int, ...] = CONCURRENCY
    rounds: int = 3  # measurements at concurrency 1, after one that is thrown away
    requests: int = 4  # of a measurement at concurrency 1; otherwise as many as are sent at once
    flags: tuple[str, ...] = ()

    def requests_at(self, concurrency: int) -> int:
        """Requests of one measurement."""
        return self.requests if concurrency == 1 else concurrency

    def rounds_at(self, concurrency: int) -> int:
        """As many measurements as send no fewer requests in all than those at concurrency 1."""
        return math.ceil(self.rounds * self.requests / self.requests_at(concurrency))


def words(plan: Plan, url: str, model: Path, length: int, concurrency: int, seed: int) -> list[str]:
    """The client's command line for one measurement."""
    return [
        "--backend", "sglang", "--base-url", url, "--model", str(model), "--tokenizer", str(model),
        "--dataset-name", "random-ids", "--tokenize-prompt", "--random-input-len", str(length),
        "--random-output-len", "1", "--random-range-ratio", "1.0", "--num-prompts",
        str(plan.requests_at(concurrency)), "--max-concurrency", str(concurrency),
        "--warmup-requests", "0", "--seed", str(seed), "--disable-tqdm", "--disable-ignore-eos",
    ]  # fmt: skip


def arm_config(plan: Plan, arm: str, model: Path) -> tuple[ServeConfig, Row]:
    """The server of one arm and the variables that it gets besides."""
    kernels, backend, gdn = ARMS[arm]
    flags = (
        "--load-format", "dummy", "--disable-radix-cache", "--sampling-backend", "pytorch",
        "--linear-attn-prefill-backend", backend,
    )  # fmt: skip
    device = serve_config.detect_device()
    if device == "cuda":
        flags += serve_config.fixed_pools(tokens=262144, states=64, share=0.85)
        flags += ("--max-running-requests", "32", "--cuda-graph-max-bs-decode", "8")
    flags += plan.flags
    config = ServeConfig(
        model=str(model), kernels=kernels, device=device, port=serve_config.free_port(), extra=flags
    )
    strict = {"SGLANG_TRINV_STRICT": "1", "SGLANG_TRINV_GDN": gdn} if gdn else {}
    return config, strict


def start_arms(plan: Plan, model: Path, stack: ExitStack) -> tuple[dict[str, Server], Row]:
    """Start the arms side by side; return the servers and why others are missing."""
    servers: dict[str, Server] = {}
    absent: Row = {}

    @contextmanager
    def or_absent(arm: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            absent[arm] = str(error).splitlines()[0]
            print(f"{plan.model} {arm}: not served: {error}", flush=True)

    for arm in plan.arms:
        config, more = arm_config(plan, arm, model)
        environ = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_TRINV")} | more
        with or_absent(arm):
            serve_config.check(config, environ)
            server = Server(config, runs.new_run_dir(), environ)
            server.start()
            stack.callback(server.stop)
            servers[arm] = server
    for arm, server in servers.items():
        with or_absent(arm):
            seconds = server.wait_healthy(START_TIMEOUT_S)
            print(f"{plan.model} {arm}: ready after {seconds:.0f} s", flush=True)
        if arm in absent:
            server.stop()
    return {arm: server for arm, server in servers.items() if arm not in absent}, absent


def measure(
    plan: Plan, model: Path, servers: dict[str, Server], client: Client
) -> Iterator[list[Row]]:
    """Every length and concurrency on every server, in turns; the rows of each as they come."""
    for length in plan.lengths:
        for concurrency in plan.concurrency:
            samples: dict[str, list[Row]] = {arm: [] for arm in servers}
            errors: Row = {}
            # The first measurement compiles and tunes. Many long prompts make the calls of one, for
            # a chunk of the prefill holds no more of them.
            warm = concurrency != min(plan.concurrency) and length != min(plan.lengths)
            for i in range(1 if warm else 0, plan.rounds_at(concurrency) + 1):
                names = list(servers)
                for arm in names[i % len(names) :] + names[: i % len(names)]:
                    seed = length + 1000 * i  # the same prompts for every arm
                    url = servers[arm].config.url
                    found = client.measure(words(plan, url, model, length, concurrency, seed))
                    if "error" in found or any(found["errors"]):
                        errors[arm] = found.get("error") or next(filter(None, found["errors"]))
                    elif i:
                        samples[arm].append(found)
            rows = [row(plan.model, length, concurrency, arm, samples[arm], errors)
                    for arm in servers]  # fmt: skip
            print(*map(line, rows), sep="\n", flush=True)
            yield rows


def row(
    model: str, length: int, concurrency: int, arm: str, samples: list[Row], errors: Row
) -> Row:
    """One row of the results; without figures and with ``error`` where a request failed."""
    made: Row = {
        "model": model, "prompt_tokens": length, "concurrency": concurrency, "arm": arm,
    }  # fmt: skip
    if arm in errors or not samples:
        return made | {"error": str(errors.get(arm, "no measurement"))[:300]}
    ttfts = [1e3 * value for found in samples for value in found["ttfts"]]
    p20, p80 = numpy.percentile(ttfts, (20, 80)).tolist()
    return made | {
        "ttft_ms": {
            "median": round(statistics.median(ttfts), 2),
            "p20": round(p20, 2),
            "p80": round(p80, 2),
        },
        "prefill_tokens_per_s": round(statistics.median(f["input_throughput"] for f in samples)),
        "requests": len(ttfts),
    }


def line(row: Row) -> str:
    """One row for the terminal."""
    head = f"{row['model']:14} {row['prompt_tokens']:6} x{row['concurrency']:<3} {row['arm']:10}"
    if "error" in row:
        return f"{head} {row['error']}"
    ttft = row["ttft_ms"]
    return (
        f"{head} {ttft['median']:9.1f} [{ttft['p20']:.1f}, {ttft['p80']:.1f}] ms, "
        f"{row['prefill_tokens_per_s']:8} tokens/s"
    )


def calls(servers: dict[str, Server]) -> Row:
    """Calls that our kernels answered in each arm: none in stock, some in ours."""
    found = {}
    for arm, server in servers.items():
        statuses = health.schedulers(server.run_dir)
        found[arm] = {name: health.calls(statuses, name) for name in health.IMPLEMENTATION.values()}
        found[arm]["fallbacks"] = sum(sum(s["fallbacks"].values()) for s in statuses)
    return found


def profiles(servers: dict[str, Server], folder: Path) -> Row:
    """One prefill of each arm under SGLang's profiler, or ``{"error": ...}``."""
    found = {}
    for arm, server in servers.items():
        try:
            found[arm] = serve_profile.profile(server.config, GOAL_TOKENS, folder / arm)
        except ServeError as error:
            found[arm] = {"error": str(error)}
    return found


def run(plan: Plan, found: Row, out: Path) -> None:
    """Serve and measure one model; write what is known to ``out`` after every case.

    Adds to ``found``: ``rows``, and by model ``absent`` arms with reasons, ``calls`` and
    ``profiles`` by arm.
    """
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        model = serve_models.write(plan.model, Path(folder) / plan.model)
        client = Client()  # first: without it there is nothing to start servers for
        stack.callback(client.close)
        servers, found["absent"][plan.model] = start_arms(plan, model, stack)
        found["flags"][plan.model] = list(plan.flags)
        for rows in measure(plan, model, servers, client) if servers else ():
            found["rows"] += rows
            output.write(out, found)
        time.sleep(1.5)  # the counts lag by a second
        found["calls"][plan.model] = calls(servers)
        if serve_config.detect_device() == "cuda":
            found["profiles"][plan.model] = profiles(servers, Path(folder) / "profiles")
        output.write(out, found)


def main(plans: list[Plan], out: Path, minutes: float) -> int:
    """Measure every plan into ``out``; exit code 1 if an arm of ours fell back."""
    found: Row = {
        "provenance": _provenance(), "rows": [], "absent": {}, "calls": {}, "profiles": {},
        "profiled_tokens": GOAL_TOKENS, "flags": {},
    }  # fmt: skip
    start = time.monotonic()
    for plan in plans:
        if time.monotonic() - start > 60 * minutes:
            print(f"{plan.model}: no time left")
            break
        run(plan, found, out)
    print(serve_report.table(found))
    serve_report.plot(found, out.with_suffix(".png"))
    wrong = complaints(found["calls"])
    for complaint in wrong:
        print(f"WRONG: {complaint}")
    return int(bool(wrong))


def complaints(by_model: Row) -> list[str]:
    """Stock arms that called us, arms of ours that did not or fell back."""
    wrong = []
    for model, by_arm in by_model.items():
        for arm, counts in by_arm.items():
            ours = sum(counts[name] for name in health.IMPLEMENTATION.values())
            if ARMS[arm][0] == "stock" and ours:
                wrong.append(f"{model} {arm}: our kernels were called {ours} times")
            if ARMS[arm][0] == "ours" and not ours:
                wrong.append(f"{model} {arm}: our kernels were never called")
            if counts["fallbacks"]:
                wrong.append(f"{model} {arm}: {counts['fallbacks']} calls fell back")
    return wrong


def _provenance() -> Row:
    import torch

    if torch.cuda.is_available():
        from benchmarks.provenance import provenance

        made = provenance(None, serve_config.check_release())
        with suppress(importlib.metadata.PackageNotFoundError):  # the servers load it, not we
            made["versions"]["flashinfer"] = importlib.metadata.version("flashinfer-python")
        return made
    return {"argv": sys.argv, "gpu": None, "versions": {"sglang": serve_config.check_release()}}
