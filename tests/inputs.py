"""Inputs for tests: the package's hostile ones, the ragged ones, real gates, poisoned memory."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from sglang_trinv.reference.inputs import (
    HARD_INPUTS,
    OUTSIDE_BOUND,
    Case,
    Inputs,
    cosine_keys,
    cu_seqlens_of,
    hard_matrices,
    paper_matrix,
)
from sglang_trinv.reference.layout import ChunkLayout

__all__ = [
    "HARD_INPUTS",
    "OUTSIDE_BOUND",
    "Case",
    "Inputs",
    "cosine_keys",
    "cu_seqlens_of",
    "hard_matrices",
    "paper_matrix",
]

LENGTHS = {
    **{str(n): [n] for n in (0, 1, 2, 15, 16, 17, 63, 64, 65, 75, 111, 127, 128)},
    "ragged": [64, 111, 192],
    "empty in the middle": [33, 0, 70],
    "empty at both ends": [0, 65, 0],
    "single tokens": [1] * 5,
}
GVA_RATIOS = (1, 2, 3, 4)
SPLIT_METHODS = ("mbh_tf32x3", "mbh_bf16x3")  # both operands of each product in two parts
GATES_VARIABLE = "SGLANG_TRINV_GATES"
REAL_GATES = ("Qwen3-Next", "Qwen3.5-0.8B")


def chunk_indices_of(cu_seqlens: Tensor, chunk_size: int = 64) -> Tensor:
    """(sequence, chunk in it) of every chunk, [NT, 2].

    SGLang's own prepare_chunk_indices names the wrong sequence after an empty one.
    """
    layout = ChunkLayout.of(1, int(cu_seqlens[-1]), cu_seqlens, chunk_size, cu_seqlens.device)
    return torch.stack([layout.sequence, layout.position], 1).to(cu_seqlens)


def real_gates(name: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """g and beta (float32 [1, 8192, H]) and cu_seqlens of one layer of a real model's prefill.

    Skips the test where the optional data are not there.
    """
    folder = os.environ.get(GATES_VARIABLE)
    if not folder:
        pytest.skip(f"{GATES_VARIABLE} is not set: no folder with real gate tensors")
    path = Path(folder) / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"{GATES_VARIABLE}: no file {path}")
    with np.load(path, allow_pickle=False) as data:
        arrays = (data["g"], data["beta"], data["cu_seqlens"])
    return tuple(torch.from_numpy(x).to(device) for x in arrays)


def real_gate_inputs(
    name: str, case: str = "cosine 0.98", H: int | None = None, Hg: int = 1, **options
) -> Inputs:
    """The hard keys of ``case`` with the gates of a real model; H heads of it (default: all)."""
    device = options.pop("device", "cpu")
    g, beta, cu_seqlens = real_gates(name)
    H = g.shape[-1] if H is None else H
    x = HARD_INPUTS[case].build(g.shape[1], Hg=Hg, H=H, **options)
    g, beta = g[..., :H].contiguous(), beta[..., :H].contiguous()
    return replace(x, g=g, beta=beta, cu_seqlens=cu_seqlens).to(device)


def poison(x: Tensor) -> Tensor:
    """Fill with NaN (integers: the largest value) and return x."""
    if x.is_floating_point() or x.is_complex():
        return x.fill_(math.nan)
    return x if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).max)


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside, torch.empty, empty_like, empty_strided and Tensor.new_empty give poisoned memory."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (Tensor, "new_empty"),
        ):
            replaced = mock.patch.object(owner, name, poisoned(getattr(owner, name)))
            stack.enter_context(replaced)
        yield
