"""One row for each input, method, precision and size: how far the inverse is off."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sglang_trinv import ops
from sglang_trinv.reference.methods import METHODS, SIZES, invert
from sglang_trinv.study.cases import Cases

METRICS = ("max_abs", "max_rel", "rel_fro", "residual", "layer")
PRECISIONS = ("fp16", "bf16", "tf32", "fp32", "bf16x3", "tf32x3")
VISIBLE = 2.0**-24  # smaller entries of the inverse vanish beside 1 in float32
STOCK = "sglang.kernels.ops.attention.fla.solve_tril"

Row = dict[str, Any]


def errors(cases: Cases, X: Tensor) -> dict[str, list[float]]:
    """Each metric for each input, the worst over its chunks and heads; inf where not finite.

    ``max_abs``: largest error of an entry. ``max_rel``: the same relative to the entry, entries
    below 2^-24 left out. ``rel_fro``: relative Frobenius error. ``residual``:
    ||I - (I + A) X||_F / sqrt(n). ``layer``: relative Frobenius error of the layer's output, nan
    for inputs that are matrices alone.
    """
    X, truth = X.double(), cases.X
    eye = torch.eye(cases.n, dtype=truth.dtype, device=truth.device)
    difference = (X - truth).abs()
    visible = truth.abs() >= VISIBLE
    norm = torch.linalg.matrix_norm
    found = {
        "max_abs": difference.amax((-1, -2)),
        "max_rel": torch.where(visible, difference / truth.abs(), 0.0).amax((-1, -2)),
        "rel_fro": norm(X - truth) / norm(truth),
        "residual": norm(eye - X - cases.A @ X) / math.sqrt(cases.n),
    }
    worst = {name: _finite(x).amax(1).tolist() for name, x in found.items()}
    o = cases.output(X)
    layer = _finite((o - cases.o).flatten(1).norm(dim=1) / cases.o.flatten(1).norm(dim=1))
    without = len(cases.names) - cases.layers
    return {**worst, "layer": layer.tolist() + [math.nan] * without}


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=math.inf, posinf=math.inf)


def rows(cases: Cases, X: Tensor, **labels: Any) -> Iterator[Row]:
    """Rows of one method; ``labels`` are its columns."""
    found = errors(cases, X)
    for i, (family, name) in enumerate(zip(cases.families, cases.names, strict=True)):
        yield {
            **labels,
            "n": cases.n,
            "family": family,
            "input": name,
            "growth": cases.growth[i],
            **{metric: found[metric][i] for metric in METRICS},
        }


def emulated(cases: Cases, method: str, precision: str) -> Iterator[Row]:
    """Rows of a method whose products are rounded in emulation."""
    X = invert(cases.A, method, precision)
    return rows(cases, X, kind="emulated", method=method, precision=precision)


def compiled(cases: Cases) -> Iterator[Row]:
    """Rows of the project's kernel, each method of it, and of SGLang's where it is installed.

    Nothing where Triton does not run, or for chunks that the kernel does not know.
    """
    if ops.implementation(cases.A.device) == "torch" or cases.n > 64:
        return
    for name, precision in ops.METHODS.items():
        if name != "auto":
            X = _packed(cases, lambda A, name=name: ops.solve_tril(A, method=name))
            yield from rows(cases, X, kind="compiled", method="MBH16", precision=precision)
    stock = _stock() if cases.A.is_cuda else None
    if stock is not None:
        X = _packed(cases, lambda A: stock(A, output_dtype=torch.float32))
        yield from rows(cases, X, kind="compiled", method="SGLang", precision="fp32")  # "ieee"


def _packed(cases: Cases, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """``solve`` on [1, T, H, n]; every matrix is a chunk of one head."""
    A = cases.A.float().flatten(0, 1)
    X = solve(A.reshape(1, -1, 1, cases.n).contiguous())
    return X.reshape(A.shape).unflatten(0, cases.A.shape[:2])


def _stock() -> Callable[..., Tensor] | None:
    try:
        known = importlib.util.find_spec(STOCK)
    except ModuleNotFoundError:  # of a parent
        return None
    return None if known is None else importlib.import_module(STOCK).solve_tril


def work(quick: bool) -> list[tuple[int, str, str]]:
    """(size, method, precision) of everything that is emulated."""
    sizes, precisions = ((16, 64), ("fp16", "fp32")) if quick else (SIZES, PRECISIONS)
    pairs = [(method, p) for method in METHODS for p in precisions] + [("FS16", "tf32rz")]
    return [(n, method, p) for n in sizes for method, p in pairs]
