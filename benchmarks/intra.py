"""`python -m benchmarks intra`: the intra-chunk ops against SGLang's and fla's on one GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import implementations, output, precompile, report, timing
from benchmarks.cases import CASES, Case, Inputs, build
from benchmarks.provenance import provenance

SLACK = 1.2  # times the larger of SGLang's error and the rounding of the truth


def main(
    out: Path,
    sglang: str | None,
    fla: str | None,
    sglang_release: str | None,
    rounds: int,
    only: str,
    compile_first: bool,
) -> int:
    """Measure, print the table, write ``out`` and, beside it, a roofline plot.

    Returns:
        The exit code: 1 if a result of ours is less accurate than SGLang's allows.
    """
    cases = tuple(case for case in CASES if only in case.op)
    names = implementations.find_peers(sglang, fla)
    seconds = precompile.run(cases, names, (sglang, fla)) if compile_first else 0.0
    print(f"compiled for {seconds:.0f} s", flush=True)
    precompile.tune_quickly()
    bandwidth = timing.copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for case in cases:
        for row in measure_case(case, names, rounds):
            rows.append(row)
            print(report.line(row), flush=True)
    found = {
        "provenance": {
            **provenance(sglang, sglang_release),
            "rounds": rounds,
            "compile_s": round(seconds, 1),
            "copy_bytes_per_s": round(bandwidth),
        },
        "rows": rows,
    }
    output.write(out, found)
    print(report.table(found))
    report.plot(found, out.with_suffix(".png"))
    return int(any(row["accurate"] is False for row in rows))


def measure_case(case: Case, names: tuple[str, ...], rounds: int) -> list[dict[str, Any]]:
    """Rows of one case: correctness of every implementation first, then time."""
    x = build(case)
    calls = implementations.implementations(case.op, names)
    indices = None if x.cu_seqlens is None else chunk_indices(case.lengths)
    errors = compare(case, x, calls, indices)
    peak = {
        key: timing.peak_bytes(functools.partial(call, x, x.cu_seqlens, indices))
        for key, call in calls.items()
    }
    rows = []
    for metadata in ("none",) if indices is None else ("inside", "given"):
        prepare = {
            key: functools.partial(ready, call, x, indices, metadata) for key, call in calls.items()
        }
        times = timing.measure(prepare, rounds)
        for (name, variant), found in times.items():
            rows.append(
                {
                    "op": case.op,
                    "lengths": list(case.lengths),
                    "hk": case.hk,
                    "hv": case.hv,
                    "dtype": "bfloat16",
                    "impl": name,
                    "variant": variant,
                    "metadata": metadata,
                    **found["device"],
                    "wall": found["wall"],
                    **errors[name, variant],
                    "peak_bytes": peak[name, variant],
                    "least_bytes": case.least_bytes,
                    "flops": case.flops,
                    "at_most_us": case.at_most_us,
                }
            )
    return rows


def ready(call: Callable[..., Any], x: Inputs, indices: Any, metadata: str) -> timing.Thunk:
    """The call to time; where it must prepare its metadata, lengths that nobody has seen before."""
    if metadata == "inside":
        return functools.partial(call, x, x.cu_seqlens.clone(), None)
    return functools.partial(call, x, x.cu_seqlens, indices)


def chunk_indices(lengths: tuple[int, ...]) -> torch.Tensor:
    """(sequence, chunk in it) of every chunk, int32 [NT, 2]."""
    rows = [(n, c) for n, length in enumerate(lengths) for c in range(math.ceil(length / 64))]
    return torch.tensor(rows, dtype=torch.int32, device="cuda")


def compare(
    case: Case, x: Inputs, calls: dict[tuple[str, str], Any], indices: Any
) -> dict[tuple[str, str], dict[str, Any]]:
    """Relative Frobenius errors, and whether ours is as accurate as SGLang's (None: not judged)."""
    wanted = implementations.truth(case.op, x)
    floor = {name: output.rel_err(t.to(x.k.dtype), t) for name, t in wanted.items()}
    errors = {
        key: {
            name: output.rel_err(result, wanted[name])
            for name, result in implementations.lower(call(x, x.cu_seqlens, indices)).items()
        }
        for key, call in calls.items()
    }
    found = {}
    for (impl, variant), seen in errors.items():
        stock = errors.get(("sglang", variant))
        accurate = None
        if impl == "ours" and stock is not None:
            accurate = all(e <= SLACK * max(floor[n], stock[n]) for n, e in seen.items())
        found[impl, variant] = {
            "rel_err": max(seen.values()),
            "rel_errs": seen,
            "accurate": accurate,
        }
    return found
