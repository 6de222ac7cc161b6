"""ServeConfig -> argv and environment. Pure: no process, no GPU, nothing read but the arguments."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_trinv.serve.config import PLATFORM, ServeConfig, flag_value

# What SGLang needs on the CPU platform, each overridden by the same flag of the user.
CPU_FLAGS: dict[str, str | None] = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--cuda-graph-backend-decode": "disabled",
    "--cuda-graph-backend-prefill": "disabled",
    # the default, extra_buffer, wants a GPU and pinned memory; no_buffer wants no overlap
    "--mamba-radix-cache-strategy": "no_buffer",
    "--disable-overlap-schedule": None,
    "--sleep-on-idle": None,  # an idle scheduler would spin on one of few cores
    # the pools are sized by the two flags below, not by the machine's memory
    "--mem-fraction-static": "0.05",
    "--max-total-tokens": "8192",
    "--max-running-requests": "8",
}
CPU_ENV = {"SGLANG_PLATFORM": PLATFORM, "TRITON_INTERPRET": "1"}
# The interpreter is one Python thread; more OpenMP threads only take its core away.
CPU_ENV_DEFAULTS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
NOT_ON_CPU = ("SGLANG_USE_CPU_ENGINE",)  # would ask for SGLang's own CPU kernel library


@dataclass(frozen=True)
class Command:
    """What to execute."""

    argv: tuple[str, ...]
    env: dict[str, str]


def build(
    config: ServeConfig, run_dir: Path, environ: Mapping[str, str], python: str = sys.executable
) -> Command:
    """The command line of ``config``.

    Args:
        run_dir: where the server's processes write their status.
        environ: the environment that they inherit.
    """
    argv = [python, "-m", "sglang.launch_server", "--model-path", config.model]
    argv += ["--host", config.host, "--port", str(config.port)]
    if config.device == "cpu":
        for flag, value in CPU_FLAGS.items():
            if flag_value(config.extra, flag) is None:
                argv += [flag] if value is None else [flag, value]
    return Command((*argv, *config.extra), environment(config, run_dir, environ))


def spell(config: ServeConfig) -> str:
    """The command line of ``config`` for a shell, with the variables that are set for it."""
    made = build(config, Path(), {}, python="python")
    del made.env["SGLANG_TRINV_RUN_DIR"]  # the plugin makes one
    words = [f"{name}={shlex.quote(value)}" for name, value in made.env.items()]
    return " ".join([*words, shlex.join(made.argv)])


def environment(config: ServeConfig, run_dir: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the server: the arms of a comparison differ by SGLANG_TRINV alone."""
    env = {**environ, "PYTHONUNBUFFERED": "1"}
    env["SGLANG_TRINV"] = "1" if config.kernels == "ours" else "0"
    env["SGLANG_TRINV_RUN_DIR"] = str(run_dir)
    if config.device == "cpu":
        env = {**CPU_ENV_DEFAULTS, **env, **CPU_ENV}
        for name in NOT_ON_CPU:
            env.pop(name, None)
    return env
