"""Several real servers on the GPUs of this machine, started side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sglang_trinv.serve.config import ServeConfig, fixed_pools, free_port
from sglang_trinv.serve.launch import Server
from tests.e2e.client import Client

START_S = 300.0
FLAGS = (
    "--linear-attn-prefill-backend", "triton", "--attention-backend", "triton",
    "--sampling-backend", "pytorch", *fixed_pools(tokens=131072, states=256, share=0.4),
    "--cuda-graph-max-bs-decode", "8", "--chunked-prefill-size", "2048",
)  # fmt: skip
Name = TypeVar("Name")


@dataclass(frozen=True)
class Arm:
    """SGLang's own kernels where ``environ``, the plugin's settings, is None."""

    environ: dict[str, str] | None
    flags: tuple[str, ...] = ()


@contextmanager
def running(model: Path, arms: dict[Name, Arm], folder: Path) -> Iterator[dict[Name, Client]]:
    """Yield a client of each arm; all of them are up."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_TRINV")}
    servers = {}
    with ExitStack() as stack:
        for i, (name, arm) in enumerate(arms.items()):
            config = ServeConfig(
                model=str(model), kernels="stock" if arm.environ is None else "ours",
                device="cuda", port=free_port(), extra=(*FLAGS, *arm.flags),
            )  # fmt: skip
            run_dir = folder / str(i)
            run_dir.mkdir()
            servers[name] = Server(config, run_dir, {**environ, **(arm.environ or {})})
            stack.callback(servers[name].stop)
            servers[name].start()
        for server in servers.values():
            server.wait_healthy(timeout_s=START_S)
        yield {name: Client(server) for name, server in servers.items()}
