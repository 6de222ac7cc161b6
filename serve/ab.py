"""``serve --ab``: stock and ours side by side on this machine, for clients that compare them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from sglang_trinv import runs
from sglang_trinv.serve.config import ServeConfig, flag_value
from sglang_trinv.serve.launch import Server

PREFILL = "--linear-attn-prefill-backend"
MEMORY = "--mem-fraction-static"
# Of the memory that is free when an arm starts: 0.4 of all, then 0.6 of the other 0.6.
SHARED_MEMORY = {"ours": "0.4", "stock": "0.6"}


def arms(config: ServeConfig, gpus: int = 0) -> tuple[ServeConfig, ServeConfig]:
    """Ours at the port of ``config``, stock at the next; they differ by SGLANG_TRINV alone.

    Both prefill with the Triton backend unless the user names another: SGLang would choose by
    itself, for one as for the other, but may choose one that neither replaces. With enough GPUs
    each arm has its own, otherwise they share memory.

    Args:
        gpus: how many there are.
    """
    extra = config.extra
    if flag_value(extra, PREFILL) is None:
        extra = (*extra, PREFILL, "triton")
    more: dict[str, tuple[str, ...]] = {"ours": (), "stock": ()}
    size = _tensor_parallel_size(extra)
    if config.device == "cuda" and gpus >= 2 * size:
        more["stock"] = ("--base-gpu-id", str(size))
    elif config.device == "cuda" and flag_value(extra, MEMORY) is None:
        more = {name: (MEMORY, share) for name, share in SHARED_MEMORY.items()}
    ours, stock = (
        ServeConfig(
            **{**config.model_dump(), "kernels": kernels, "port": config.port + i,
               "extra": extra + more[kernels]}
        )
        for i, kernels in enumerate(("ours", "stock"))
    )  # fmt: skip
    return ours, stock


def _tensor_parallel_size(extra: tuple[str, ...]) -> int:
    for name in ("--tp-size", "--tensor-parallel-size", "--tp"):
        value = flag_value(extra, name)
        if value and value.isdigit():
            return int(value)
    return 1


@contextmanager
def servers(
    configs: tuple[ServeConfig, ...], begin: Callable[[Server], None]
) -> Iterator[list[Server]]:
    """Start one after the other: started together, they would count each other's memory as free.

    Args:
        begin: waits until a server is healthy.
    """
    with ExitStack() as stack:
        started = []
        for config in configs:
            server = stack.enter_context(Server(config, runs.new_run_dir()))
            begin(server)
            started.append(server)
        yield started


def wait(started: list[Server], show: Callable[[str], None]) -> None:
    """Pass on both logs, each line with its arm, until a server ends; never returns otherwise."""
    logs = [(server, server.follow(from_end=True)) for server in started]
    while True:
        for server, lines in logs:
            while (line := next(lines)) is not None:
                show(f"[{server.config.kernels}] {line}")
            server.check_alive()
        time.sleep(0.5)
