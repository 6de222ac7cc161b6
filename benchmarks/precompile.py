"""Compile what a benchmark needs in parallel, before anything is timed.

Triton keeps compiled kernels on disk. Autotuned kernels of the peers come in up to 16
configurations that Triton would compile one after the other: here each worker leaves an autotuner
one of them, so that nothing is tuned while others compute.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from triton.runtime.autotuner import Autotuner
from triton.testing import do_bench

from benchmarks import implementations
from benchmarks.cases import KDA, Case, build

MOST_CONFIGURATIONS = 16  # of one kernel: SGLang's and fla's token-parallel KDA kernel
PEERS = ("sglang.", "fla.")

Job = tuple[Case, str, str, int | None]  # case, implementation, variant, configuration


def jobs(cases: tuple[Case, ...], names: tuple[str, ...]) -> list[Job]:
    """What to compile, the slowest first."""
    found: dict[Job, None] = {}
    for case in sorted(cases, key=lambda case: case.op != KDA):
        for name, variant in implementations.implementations(case.op, names):
            if name == "ours":  # its launch configuration goes by the number of chunks
                found[(case, name, variant, None)] = None
            else:
                for i in range(MOST_CONFIGURATIONS):
                    found[(case.shortened(128), name, variant, i)] = None
    return list(found)


def run(cases: tuple[Case, ...], names: tuple[str, ...], folders: tuple[Any, Any]) -> float:
    """Compile everything for ``cases``; returns the seconds it took.

    What does not compile is printed and left to the measurement: a configuration that needs more
    shared memory than there is, its autotuner drops as well.
    """
    start = time.perf_counter()
    workers = max(1, min(16, (os.cpu_count() or 2) - 1))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, implementations.find_peers, folders) as pool:
        for job, error in pool.map(_compile, jobs(cases, names)):
            if error:
                print(f"not compiled: {job[1]} {job[2]} {job[0].op} {job[0].title}: {error}")
    return time.perf_counter() - start


def _compile(job: Job) -> tuple[Job, str]:
    case, name, variant, configuration = job
    call = implementations.implementations(case.op, (name,))[name, variant]
    try:
        x = build(case)
        if configuration is not None:
            for tuner in autotuners():
                every = vars(tuner).setdefault("every_configuration", tuner.configs)
                tuner.configs = [every[configuration % len(every)]]
                tuner.cache.clear()
        call(x, x.cu_seqlens, None)
        torch.cuda.synchronize()
    except Exception as error:
        return job, f"{type(error).__name__}: {error}"[:500]
    return job, ""


def autotuners() -> Iterator[Autotuner]:
    """The peers' autotuned kernels that are imported."""
    seen: set[int] = set()
    for module in [m for n, m in sys.modules.items() if n.startswith(PEERS)]:
        for kernel in list(vars(module).values()):
            while kernel is not None and id(kernel) not in seen:
                if type(kernel).__module__.partition(".")[0] not in ("triton", "fla"):
                    break
                seen.add(id(kernel))
                if isinstance(kernel, Autotuner):
                    yield kernel
                kernel = getattr(kernel, "fn", None)


def tune_quickly() -> None:
    """Let the autotuners compare configurations for 20 ms each rather than 100."""

    def quick(kernel_call: Any, quantiles: Any = None, **_: Any) -> Any:
        return do_bench(kernel_call, warmup=5, rep=20, quantiles=quantiles)

    for tuner in autotuners():
        vars(tuner)["do_bench"] = quick
