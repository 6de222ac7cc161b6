"""What `python -m benchmarks intra` measures: shapes of real models, with the bytes they move."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sglang_trinv.reference.chunk import chunk_local_cumsum

K = V = 128
BT = 64


def spell(lengths: Sequence[int]) -> str:
    """``16 x 2048`` or ``[24576, 8192]``."""
    same = len(set(lengths)) == 1
    return f"{len(lengths)} x {lengths[0]}" if same else str(list(lengths))


@dataclass(frozen=True)
class Case:
    """One op on one batch.

    ``at_most_us`` is the project's goal on an H200, None where there is none.
    """

    op: str
    lengths: tuple[int, ...]
    hk: int
    hv: int
    at_most_us: float | None = None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def title(self) -> str:
        many = len(self.lengths) > 1
        return f"{spell(self.lengths) if many else self.lengths[0]}, {self.hk}/{self.hv}"

    def shortened(self, tokens: int) -> Case:
        """At most two sequences, each of at most ``tokens``: compiles to the same code."""
        lengths = tuple(min(n, tokens) for n in self.lengths[:2])
        return replace(self, lengths=lengths, at_most_us=None)

    @property
    def least_bytes(self) -> int:
        """Every input read once and every wanted result written once."""
        key, value = 2 * K * self.hk, 2 * V * self.hv
        gates, Ai = 8 * self.hv, 2 * BT * self.hv
        per_token = {
            "solve_tril": 4 * BT * self.hv + Ai,
            "kkt_solve": key + gates + Ai,
            "fwd_intra": key + value + gates + 2 * K * self.hv + value,
            "chunk_kda_fwd_intra": 2 * key + 2 * value + (4 * K + 4) * self.hv + 2 * key + Ai,
        }[self.op]
        return per_token * self.tokens

    @property
    def flops(self) -> int:
        """Operations below the diagonals alone: products of keys, inverse, w and u."""
        gram, inverse, wy = BT * BT * K, BT**3 // 3, BT * BT * (K + V)
        per_chunk = {
            "solve_tril": inverse * self.hv,
            "kkt_solve": gram * self.hk + inverse * self.hv,
            "fwd_intra": gram * self.hk + (inverse + wy) * self.hv,
            "chunk_kda_fwd_intra": (2 * gram + inverse + wy) * self.hv,
        }[self.op]
        return per_chunk * sum(math.ceil(n / BT) for n in self.lengths)


KDA = "chunk_kda_fwd_intra"
CASES = (
    Case("solve_tril", (8192,), 16, 32, 35),
    Case("solve_tril", (8192,), 16, 64, 65),
    Case("kkt_solve", (8192,), 16, 32, 32),
    Case("kkt_solve", (8192,), 16, 64, 54),
    Case("kkt_solve", (32768,), 16, 32, 115),
    Case("fwd_intra", (8192,), 16, 32, 75),
    Case("fwd_intra", (8192,), 16, 64, 140),
    Case("fwd_intra", (32768,), 16, 32, 280),
    Case("fwd_intra", (8192,), 16, 48, 110),
    Case("fwd_intra", (8192,), 2, 4, 18),
    Case("fwd_intra", (8192,), 4, 8, 25),
    Case("fwd_intra", (128,) * 64, 16, 32, 80),
    Case("fwd_intra", (1024,) * 8, 16, 32, 80),
    Case("fwd_intra", (24576, 8192), 16, 32, 290),
    Case(KDA, (8192,), 32, 32, 240),
    Case(KDA, (2048,), 32, 32, 64),
    Case(KDA, (8192,), 4, 4, 40),
)


@dataclass(frozen=True)
class Inputs:
    """Tensors of one case on the GPU; gates are summed within the chunks."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor  # float32 [1, T, hv], natural log; KDA: [1, T, hv, K], log2
    beta: torch.Tensor
    A: torch.Tensor | None  # float32 [1, T, hv, 64], for solve_tril
    cu_seqlens: torch.Tensor | None  # int32 [N + 1], None for one sequence

    @functools.cached_property
    def g_log2(self) -> torch.Tensor:
        """GDN gates to the base 2, made once: fla takes them so."""
        return self.g * math.log2(math.e)


def build(case: Case, device: str = "cuda") -> Inputs:
    """Draw normalised keys and moderate gates."""
    gen = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(1, case.tokens, *shape, generator=gen, device=device)

    cu_seqlens = None
    if len(case.lengths) > 1:
        ends = torch.tensor([0, *case.lengths], device=device).cumsum(0)
        cu_seqlens = ends.to(torch.int32)
    q, k = (torch.nn.functional.normalize(random(case.hk, K), dim=-1).bfloat16() for _ in range(2))
    channels = (K,) if case.op == KDA else ()
    g = -torch.nn.functional.softplus(random(case.hv, *channels) - 3)
    g = chunk_local_cumsum(g, cu_seqlens) * (math.log2(math.e) if case.op == KDA else 1)
    A = None
    if case.op == "solve_tril":  # strictly lower: SGLang and fla also read the other half
        row = torch.arange(case.tokens, device=device)[:, None, None] % BT
        A = torch.where(torch.arange(BT, device=device) < row, 0.1 * random(case.hv, BT), 0.0)
    beta = random(case.hv).sigmoid()
    return Inputs(q, k, random(case.hv, V).bfloat16(), g.float(), beta, A, cu_seqlens)
