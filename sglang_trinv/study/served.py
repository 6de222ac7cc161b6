"""A served model with another inverse in each arm: what `sglang-trinv eval` found, by the error.

The arms of a run are SGLang's own kernels, ours, and wrong or coarse inverses in their place. The
error of each is that of its emulation on the keys and gates that the embedded model makes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglang_trinv.errors import TrinvError
from sglang_trinv.ops.methods import AUTO, METHODS
from sglang_trinv.reference import faults
from sglang_trinv.reference.chunk import (
    CHUNK_SIZE,
    chunk_A,
    chunk_local_cumsum,
    inverse,
)
from sglang_trinv.reference.inputs import Inputs
from sglang_trinv.reference.layout import ChunkLayout

STOCK = "FS16-tf32rz"  # SGLang's kernel
Row = dict[str, Any]


def emulation(arm: str) -> tuple[str, Callable[[Tensor], Tensor]] | None:
    """(name, inverse) of an arm; None for one that is no inverse."""
    if arm in ("off", "on", *METHODS):
        method = AUTO[torch.bfloat16] if arm == "on" else arm
        arm = STOCK if arm == "off" else f"MBH16-{METHODS[method].replace('fp16x2', 'fp16')}"
    found = faults.inverse(arm)
    return None if found is None else (arm, found)


def rows(report: Path, captured: list[tuple[str, Inputs]]) -> Iterator[Row]:
    """For each comparison of a report.json: error of the arm's inverse, and what the gate saw.

    As in ``model.drift``; ``accuracy`` is pooled, ``baseline`` that of the other arm, ``verdict``
    the gate's. An arm that could not answer has no numbers.

    Raises:
        TrinvError: the file is not the report of a run.
    """
    A = torch.cat([_chunks(x) for _, x in captured])
    truth = inverse(A.double())
    try:
        found = json.loads(report.read_text())
        compared = [(_arm(c), c) for c in found["comparisons"] if c["name"] != "flashinfer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrinvError(f"--served: {report}: want report.json of a run: {error}") from None
    for arm, comparison in compared:
        emulated = emulation(arm)
        if emulated is None or comparison["name"] == "repeat on":
            continue
        name, solve = emulated
        error = torch.linalg.matrix_norm(solve(A).double() - truth)
        error = (error / torch.linalg.matrix_norm(truth)).nan_to_num(torch.inf, torch.inf)
        method, _, precision = name.partition("-") if "-" in name else (f"fault {name}", "", "")
        accuracy, change = comparison["accuracy"], comparison["loglikelihood"]
        yield {
            "arm": arm,
            "method": method,
            "precision": precision,
            "inverse": error.max().item(),
            "inverse_mean": error.mean().item(),
            "logprob": change.get("abs"),
            "kl": comparison["probe"].get("kl"),
            "accuracy": _share(accuracy, "on"),
            "baseline": _share(accuracy, "off"),
            "verdict": comparison["verdict"],
        }


def _chunks(x: Inputs) -> Tensor:
    """A of every chunk and head, float32 [chunks * H, 64, 64]."""
    layout = ChunkLayout.of(*x.k.shape[:2], None, CHUNK_SIZE, x.k.device)
    return chunk_A(layout, x.k, chunk_local_cumsum(x.g), x.beta).flatten(0, 1).float()


def _arm(comparison: Row) -> str:
    """Kind of the candidate; its name in the report has a number before it."""
    return str(comparison["candidate"]).partition("-")[2]


def _share(accuracy: Row, arm: str) -> float | None:
    return accuracy[arm] / accuracy["n"] if accuracy.get("n") else None
