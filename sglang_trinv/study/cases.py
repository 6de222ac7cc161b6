"""What the study runs on: hard inputs, inputs outside the bound, real gates, a model's own keys."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sglang_trinv.errors import TrinvError
from sglang_trinv.reference.bounds import power_growth
from sglang_trinv.reference.chunk import chunk_A, chunk_local_cumsum, inverse, naive_chunk_forward
from sglang_trinv.reference.inputs import HARD_INPUTS, OUTSIDE_BOUND, Inputs, paper_matrix
from sglang_trinv.reference.layout import ChunkLayout

K, V, HEADS, CHUNKS = 128, 64, 2, 2
LARGEST = 64  # tokens of a chunk whose layer is measured
GATE_KEYS = "cosine 0.98"  # keys that go with the gates of a real model
PAPER = "uniform [0, 1/2)"


@dataclass(frozen=True)
class Cases:
    """One size of problem: ``A`` of every chunk and head of every input, and the truths.

    Inputs whose family is "paper" are matrices alone; they stand last and have no layer. Chunks of
    more than 64 tokens, which SGLang has not, are measured without it.
    """

    n: int
    names: list[str]
    families: list[str]
    layer: Inputs  # [inputs but the paper's, CHUNKS * n, HEADS, ...]
    A: Tensor  # float64 [inputs, CHUNKS * HEADS, n, n]
    X: Tensor  # (I + A)^-1, like A
    o: Tensor  # float64 [inputs with a layer, CHUNKS * n, HEADS, V]
    growth: list[float]  # ``power_growth``, the largest of each input

    @property
    def layers(self) -> int:
        """How many inputs have a layer."""
        return self.o.shape[0]

    def output(self, X: Tensor) -> Tensor:
        """The layer's output, like o, with these inverses, like X, in place of the exact ones."""
        if not self.layers:
            return self.o
        found = X[: self.layers].unflatten(1, (CHUNKS, HEADS)).flatten(0, 1)
        return _forward(self.layer, self.n, lambda A: found)


def build(
    n: int, gates: Path | None, captured: Iterable[tuple[str, Inputs]], device: str = "cpu"
) -> Cases:
    """All inputs for chunks of ``n`` tokens, on ``device``.

    Args:
        gates: folder with NAME.npz files of ``g`` and ``beta`` [1, T, H] and ``cu_seqlens``.
        captured: (name, inputs) of a model's layers, at least CHUNKS * n tokens long.
    """
    T = CHUNKS * n
    found: list[tuple[str, str, Inputs]] = []
    for family, cases in (("hard", HARD_INPUTS), ("outside", OUTSIDE_BOUND)):
        found += [(family, name, case.build(T, HEADS, K=K, V=V)) for name, case in cases.items()]
    found += [("real gates", name, x) for name, x in real_gates(gates, T)]
    found += [("tiny model", name, first_tokens(x, T)) for name, x in captured]
    families, names, inputs = (list(column) for column in zip(*found, strict=True))
    layer = Inputs(
        *(torch.cat([getattr(x, f).float() for x in inputs]) for f in ("q", "k", "v", "g", "beta"))
    ).to(device)
    layout = ChunkLayout.of(len(names), T, None, n, layer.k.device)
    g = chunk_local_cumsum(layer.g, chunk_size=n)
    A = chunk_A(layout, layer.k, g, layer.beta).unflatten(0, (len(names), CHUNKS)).flatten(1, 2)
    A = torch.cat([A, paper_matrix(n, CHUNKS * HEADS)[None].to(device)])
    o = _forward(layer, n, inverse) if n <= LARGEST else layer.v.new_zeros(0, T, HEADS, V)
    return Cases(n, [*names, PAPER], [*families, "paper"], layer, A, inverse(A), o,
                 power_growth(A).amax(1).tolist())  # fmt: skip


def _forward(x: Inputs, n: int, solve) -> Tensor:
    return naive_chunk_forward(x.q, x.k, x.v, x.g, x.beta, chunk_size=n, solve=solve)[0]


def first_tokens(x: Inputs, T: int) -> Inputs:
    """The first ``T`` tokens and HEADS heads of captured inputs."""
    if x.k.shape[1] < T:
        raise ValueError(f"captured inputs: want {T} tokens, got {x.k.shape[1]}")
    q, k, v, g, beta = (t[:, :T, :HEADS] for t in (x.q, x.k, x.v, x.g, x.beta))
    return Inputs(q, k, v[..., :V], g, beta)


def real_gates(folder: Path | None, T: int) -> list[tuple[str, Inputs]]:
    """Hard keys under the flattest and the steepest heads of every model in ``folder``."""
    if folder is None:
        return []
    found = []
    for path in sorted(folder.glob("*.npz")):
        g, beta, cu_seqlens = _read(path)
        lengths = cu_seqlens.diff()
        start = int(cu_seqlens[int(lengths.argmax())])
        if int(lengths.max()) < T:
            raise TrinvError(f"--gates: {path}: want a sequence of {T} tokens, got {lengths.max()}")
        g, beta = g[:, start : start + T], beta[:, start : start + T]
        order = g.mean((0, 1)).argsort(descending=True)
        x = HARD_INPUTS[GATE_KEYS].build(T, HEADS, K=K, V=V)
        for kind, heads in (("flattest", order[:HEADS]), ("steepest", order[-HEADS:])):
            name = f"{path.stem}, {kind} heads"
            found.append((name, replace(x, g=g[..., heads], beta=beta[..., heads])))
    if not found:
        raise TrinvError(f"--gates: want a folder with NAME.npz files, got {folder}")
    return found


def _read(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as data:
            g, beta, cu = (torch.from_numpy(data[n]) for n in ("g", "beta", "cu_seqlens"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise TrinvError(f"--gates: {path}: want g, beta and cu_seqlens: {error}") from None
    return g.float(), beta.float(), cu.long()
