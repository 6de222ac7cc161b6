"""Keys, gates and write strengths that break inverses, and ordinary ones to compare them with.

``HARD_INPUTS[name].build(T, Hg=1, H=2, K=128, V=128, dtype=torch.bfloat16)`` gives one ``Inputs``.
Everything is drawn on the CPU from a seed, so that all devices see the same numbers. Sources: keys
and gates that broke released kernels (equal keys: FlashKDA issue 34, aiter PR 4952; long keys and
beta near 2: models with negative eigenvalues; g of -166: a head of Qwen3-Next).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
from torch import Generator, Tensor

from sglang_trinv.reference.chunk import chunk_local_cumsum, naive_chunk_A


@dataclass(frozen=True)
class Inputs:
    """Arguments of one gated delta rule call; g is the log decay of each token, not summed."""

    q: Tensor  # [1, T, Hg, K]
    k: Tensor  # [1, T, Hg, K]
    v: Tensor  # [1, T, H, V]
    g: Tensor  # float32 [1, T, H]
    beta: Tensor  # float32 [1, T, H]
    cu_seqlens: Tensor | None = None  # int32 [N + 1]

    def summed(self, chunk_size: int = 64) -> Inputs:
        """The same with g summed within each chunk, float32, as the intra kernels get it."""
        return replace(self, g=chunk_local_cumsum(self.g, self.cu_seqlens, chunk_size).float())

    def to(self, device: torch.device | str) -> Inputs:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Inputs(**{n: x if x is None else x.to(device) for n, x in values.items()})


@dataclass(frozen=True)
class Case:
    """One kind of input; ``keys`` gives unit keys [T, Hg, K], the others [T, H]."""

    keys: Callable[[Generator, int, int, int], Tensor]
    beta: Callable[[Generator, int, int], Tensor]
    g: Callable[[Generator, int, int], Tensor]
    length: float = 1.0  # norm of the keys
    bounded: bool = True  # |k| <= 1, beta <= 1 and g <= 0: the bound of docs/numerics.md holds

    def build(
        self,
        T: int,
        Hg: int = 1,
        H: int | None = None,
        K: int = 128,
        V: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        device: torch.device | str = "cpu",
        lengths: list[int] | None = None,
    ) -> Inputs:
        """Draw the inputs; keys are normalised, scaled, then rounded to ``dtype``.

        With ``lengths`` the tokens are cut into these sequences (T is then their sum).
        """
        H = Hg if H is None else H
        gen = Generator().manual_seed(seed)
        k = _unit(self.keys(gen, T, Hg, K)) * self.length
        q = _unit(torch.randn(T, Hg, K, generator=gen))
        v = torch.randn(T, H, V, generator=gen)
        beta, g = self.beta(gen, T, H), self.g(gen, T, H)
        q, k, v = (x[None].to(dtype).contiguous() for x in (q, k, v))
        cu_seqlens = None
        if lengths is not None:
            if sum(lengths) != T:
                raise ValueError(f"lengths: want the sum {T}, got {sum(lengths)}")
            cu_seqlens = cu_seqlens_of(lengths)
        return Inputs(q, k, v, g[None].float(), beta[None].float(), cu_seqlens).to(device)

    def matrix(self, n: int, batch: int = 8, seed: int = 0, K: int = 128) -> Tensor:
        """``batch`` strictly lower triangular A of one chunk of n tokens; float64 [batch, n, n]."""
        x = self.build(n, Hg=batch, K=K, V=1, seed=seed)
        g = chunk_local_cumsum(x.g, chunk_size=n)
        return naive_chunk_A(x.k, g, x.beta, chunk_size=n)[0].transpose(0, 1).contiguous()


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def random_keys(gen: Generator, T: int, Hg: int, K: int) -> Tensor:
    return torch.randn(T, Hg, K, generator=gen)


def equal_keys(gen: Generator, T: int, Hg: int, K: int) -> Tensor:
    return torch.randn(1, Hg, K, generator=gen).expand(T, -1, -1)


def cosine_keys(cosine: float) -> Callable[[Generator, int, int, int], Tensor]:
    """Keys around one direction; two of them have this cosine on average."""

    def keys(gen: Generator, T: int, Hg: int, K: int) -> Tensor:
        mean = _unit(torch.randn(1, Hg, K, generator=gen))
        rest = torch.randn(T, Hg, K, generator=gen)
        rest = _unit(rest - (rest * mean).sum(-1, keepdim=True) * mean)
        return math.sqrt(cosine) * mean + math.sqrt(1 - cosine) * rest

    return keys


def alternating_keys(gen: Generator, T: int, Hg: int, K: int) -> Tensor:
    sign = 1.0 - 2.0 * (torch.arange(T) % 2)
    return equal_keys(gen, T, Hg, K) * sign[:, None, None]


def two_cluster_keys(gen: Generator, T: int, Hg: int, K: int) -> Tensor:
    centres = torch.randn(2, Hg, K, generator=gen)
    return centres[torch.randint(2, (T,), generator=gen)]


def plane_keys(gen: Generator, T: int, Hg: int, K: int) -> Tensor:
    basis = torch.linalg.qr(torch.randn(Hg, K, 2, generator=gen)).Q
    angle = 2 * math.pi * torch.rand(T, Hg, generator=gen)
    return torch.einsum("thc,hkc->thk", torch.stack([angle.cos(), angle.sin()], -1), basis)


def repeated_keys(gen: Generator, T: int, Hg: int, K: int) -> Tensor:
    return torch.randn(16, Hg, K, generator=gen)[torch.arange(T) % 16]


def constant(value: float) -> Callable[[Generator, int, int], Tensor]:
    return lambda gen, T, H: torch.full((T, H), value)


def random_beta(gen: Generator, T: int, H: int) -> Tensor:
    return torch.randn(T, H, generator=gen).sigmoid()


def beta_at_both_ends(gen: Generator, T: int, H: int) -> Tensor:
    return torch.where(torch.rand(T, H, generator=gen) < 0.5, 1e-4, 0.9999)


def random_g(gen: Generator, T: int, H: int) -> Tensor:
    return -0.1 * torch.nn.functional.softplus(torch.randn(T, H, generator=gen))


def g_near_0(gen: Generator, T: int, H: int) -> Tensor:
    return -1e-4 * torch.rand(T, H, generator=gen)


def mixed_g(gen: Generator, T: int, H: int) -> Tensor:
    return torch.where(torch.rand(T, H, generator=gen) < 0.2, -30.0, -1e-4)


HARD_INPUTS = {
    "random": Case(random_keys, random_beta, random_g),
    "random, beta near 0 and 1": Case(random_keys, beta_at_both_ends, random_g),
    "equal keys, beta 1": Case(equal_keys, constant(1.0), g_near_0),
    "equal keys, beta 0.9997": Case(equal_keys, constant(0.9997), g_near_0),
    "equal keys, beta 0.835": Case(equal_keys, constant(0.835), g_near_0),
    "equal keys, random beta": Case(equal_keys, random_beta, g_near_0),
    "equal keys, no decay": Case(equal_keys, constant(1.0), constant(0.0)),
    "cosine 0.998": Case(cosine_keys(0.998), constant(1.0), g_near_0),
    "cosine 0.98": Case(cosine_keys(0.98), constant(0.9997), g_near_0),
    "cosine 0.5": Case(cosine_keys(0.5), constant(1.0), g_near_0),
    "alternating keys": Case(alternating_keys, constant(1.0), g_near_0),
    "two clusters": Case(two_cluster_keys, constant(1.0), g_near_0),
    "plane": Case(plane_keys, constant(1.0), g_near_0),
    "period 16": Case(repeated_keys, constant(1.0), g_near_0),
    "equal keys of length 0.9": Case(equal_keys, constant(1.0), g_near_0, length=0.9),
    "g -20": Case(cosine_keys(0.98), constant(0.9997), constant(-20.0)),
    "g -166": Case(cosine_keys(0.98), constant(0.9997), constant(-166.0)),
    "g -30 and -1e-4": Case(cosine_keys(0.98), constant(0.9997), mixed_g),
    "g 0": Case(cosine_keys(0.98), constant(1.0), constant(0.0)),
}
OUTSIDE_BOUND = {
    "equal keys, beta 1.9": Case(equal_keys, constant(1.9), g_near_0, bounded=False),
    "equal keys, beta 2": Case(equal_keys, constant(2.0), g_near_0, bounded=False),
    "random, beta 1.9": Case(random_keys, constant(1.9), random_g, bounded=False),
    "cosine 0.5, beta 2": Case(cosine_keys(0.5), constant(2.0), g_near_0, bounded=False),
    "alternating keys, beta 2": Case(alternating_keys, constant(2.0), g_near_0, bounded=False),
    "equal keys of length 1.5": Case(equal_keys, constant(1.0), g_near_0, 1.5, bounded=False),
    "random keys of length 2": Case(random_keys, constant(1.0), g_near_0, 2.0, bounded=False),
}


def paper_matrix(n: int, batch: int = 8, seed: int = 0) -> Tensor:
    """The synthetic A of arXiv 2605.21325: uniform [0, 1/2) below the diagonal; float64."""
    gen = Generator().manual_seed(seed)
    return (0.5 * torch.rand(batch, n, n, generator=gen, dtype=torch.float64)).tril(-1)


def hard_matrices(n: int, batch: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """A of every hard input and the paper's, each float64 [batch, n, n]."""
    matrices = {name: case.matrix(n, batch, seed) for name, case in HARD_INPUTS.items()}
    return {"paper": paper_matrix(n, batch, seed), **matrices}


def cu_seqlens_of(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Sequence starts, int32 [N + 1], as SGLang's query_start_loc."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
