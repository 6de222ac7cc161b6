"""``make demo``: the real server on the embedded model, our kernels live, asked and checked.

    python -m sglang_trinv.serve.demo

Exit code 1 unless the Triton kernel answered in the scheduler process, no call fell back, and our
results were within tolerance of SGLang's own kernel on the same inputs.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console

from sglang_trinv import runs
from sglang_trinv.cli import start
from sglang_trinv.errors import TrinvError
from sglang_trinv.serve import config as serve_config
from sglang_trinv.serve import health, report, tiny_model
from sglang_trinv.serve.config import ServeConfig
from sglang_trinv.serve.launch import Server, stop_on_signals
from sglang_trinv.status import read_run_dir

CHECKED_CALLS = 12
MAX_TOKENS = 16
# A key, its value, and so on; the last write of a key counts, then one key is asked for. The writes
# fill more than one chunk of the delta rule.
WRITES = "a3b5c1d8e2f6" + "b7c4d0e9f1" * 6 + "a8c2e5"
QUESTION, VALUE = f"{WRITES}|a", "8"
CODE = "def forward(self, x):"


def main() -> int:
    """Run the demonstration; return the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    environ = {**os.environ, "SGLANG_TRINV_CHECK": str(CHECKED_CALLS)}
    try:
        config = ServeConfig(
            model=str(tiny_model.PATH),
            device=serve_config.detect_device(),
            port=serve_config.free_port(),
        )
        serve_config.check(config, environ)
        run_dir = runs.new_run_dir()
        with stop_on_signals(), Server(config, run_dir, environ) as server:
            start(server, console)
            console.print(f"\n{server.verify().message}", markup=False)
            problems = ask(config.url, console) + show(run_dir, config, console)
    except TrinvError as error:
        console.print(f"error: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130
    console.print("\nServer stopped.")
    for problem in problems:
        console.print(f"[red]FAILED[/]: {problem}")
    if not problems:
        console.print("[green]OK[/]: the Triton kernel of this package served the requests.")
    return 1 if problems else 0


def ask(url: str, console: Console) -> list[str]:
    """One plain and one streaming chat completion with the official client; what is wrong."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0)
    plain, streaming = ([{"role": "user", "content": text}] for text in (QUESTION, CODE))
    options: Any = {"model": "tiny", "max_tokens": MAX_TOKENS, "temperature": 0}
    begin = time.monotonic()
    answer = client.chat.completions.create(messages=plain, **options)
    usage, reply = answer.usage, answer.choices[0].message.content
    console.print(f"\n/v1/chat/completions: {QUESTION}", markup=False)
    console.print(f"  reply: {reply!r} (a was last set to {VALUE})", markup=False)
    console.print(
        f"  {usage.prompt_tokens} prompt tokens, {usage.completion_tokens} new, "
        f"{time.monotonic() - begin:.1f} s"
    )
    console.print(f"\n/v1/chat/completions, stream: {CODE}\n  reply:", markup=False, end="")
    for chunk in client.chat.completions.create(messages=streaming, stream=True, **options):
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            console.print(f" {text!r}", markup=False, end="")
    console.print()
    return [] if reply == VALUE else [f"the model answered {reply!r}, not {VALUE!r}"]


def show(run_dir: Path, config: ServeConfig, console: Console) -> list[str]:
    """Print what every process reports; return what is wrong with it."""
    time.sleep(1.5)  # a status file lags its process by a second
    console.print("\nWhat each process reports (`sglang-trinv status`):")
    for line in report.processes(read_run_dir(run_dir)):
        console.print(f"  {line}", markup=False)
    return problems_of(health.schedulers(run_dir), health.IMPLEMENTATION[config.device])


def problems_of(schedulers: list[dict[str, Any]], implementation: str) -> list[str]:
    """Reasons why ``schedulers`` do not show what the demonstration is for."""
    found = []
    if not health.calls(schedulers, implementation):
        found.append(f"no call was answered by {implementation} in a scheduler process")
    for status in schedulers:
        check = status["check"]
        if status["calls"]["fwd_intra"]["torch"]:
            found.append("plain torch answered calls in the place of the Triton kernel")
        found += [f"stock answered {n} calls: {why}" for why, n in status["fallbacks"].items()]
        if not check["done"]:
            found.append("no call was compared with SGLang's kernel")
        if check["disagreements"]:
            found.append(f"{check['disagreements']} calls are further off than the tolerance")
    return found


if __name__ == "__main__":
    sys.exit(main())
