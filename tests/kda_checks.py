"""Inputs of the KDA intra-chunk step, SGLang's roundings, and what the op must satisfy anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Generator, Tensor

from sglang_trinv.ops import chunk_kda_fwd_intra
from sglang_trinv.reference.chunk import chunk_local_cumsum
from sglang_trinv.reference.kda import naive_kda_intra
from sglang_trinv.reference.layout import ChunkLayout
from sglang_trinv.reference.methods import invert
from tests.inputs import HARD_INPUTS, Case, chunk_indices_of, poisoned_allocations
from tests.tolerance import rel_err, tolerance, worst_chunk_err

NAMES = ("w", "u", "kg", "Aqk", "Akk")


@dataclass(frozen=True)
class KdaInputs:
    """Arguments of one call; gk is log2 of the decay, summed within the chunks."""

    q: Tensor
    k: Tensor
    v: Tensor
    gk: Tensor
    beta: Tensor
    cu_seqlens: Tensor | None = None

    def to(self, device: torch.device | str) -> KdaInputs:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return KdaInputs(**{n: x if x is None else x.to(device) for n, x in values.items()})

    def rows(self, begin: int, end: int) -> KdaInputs:
        """These tokens alone, as one sequence."""
        names = ("q", "k", "v", "gk", "beta")
        cut = {n: getattr(self, n)[:, begin:end].contiguous() for n in names}
        return replace(self, **cut, cu_seqlens=None)


def uniform_gates(steepest: float) -> Callable[[Generator, int, int], Tensor]:
    """Natural log decays between 0 and ``steepest`` a token."""
    return lambda gen, T, H: -steepest * torch.rand(T, H, generator=gen)


def two_speed_gates(gen: Generator, T: int, H: int) -> Tensor:
    """Every other channel forgets within a token, the rest never."""
    return torch.where(torch.arange(H) % 2 == 0, -40.0, -1e-5).expand(T, H)


def spiked_gates(gen: Generator, T: int, H: int) -> Tensor:
    """Hardly any decay, but at random tokens 90 nats at once: more than float32 can undo."""
    return torch.where(torch.rand(T, H, generator=gen) < 0.1, -90.0, -1e-3)


STEEP_GATES = {
    "5.9 nats": lambda gen, T, H: torch.full((T, H), -5.9),
    "up to 12 nats": uniform_gates(12.0),
    "up to 200 nats": uniform_gates(200.0),
    "two speeds": two_speed_gates,
    "spikes": spiked_gates,
}


def kda_inputs(
    case: Case,
    T: int,
    H: int = 2,
    K: int = 16,
    V: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    lengths: list[int] | None = None,
    gates: Callable[[Generator, int, int], Tensor] | None = None,
    seed: int = 0,
) -> KdaInputs:
    """Keys, queries and beta of ``case``; its gates, or ``gates``, drawn for each channel."""
    x = case.build(T, Hg=H, H=H, K=K, V=V, dtype=dtype, lengths=lengths, seed=seed)
    gen = Generator().manual_seed(seed + 1)
    g = (gates or case.g)(gen, T, H * K).view(1, T, H, K)
    gk = chunk_local_cumsum(g.double(), x.cu_seqlens) * math.log2(math.e)
    return KdaInputs(x.q, x.k, x.v, gk.float(), x.beta, x.cu_seqlens)


def run_kda(x: KdaInputs, method: str = "auto", indices: bool = True, **flags: bool) -> tuple:
    """The six results of the op into poisoned memory."""
    chunk_indices = None
    if indices and x.cu_seqlens is not None:
        chunk_indices = chunk_indices_of(x.cu_seqlens)
    with poisoned_allocations():
        return chunk_kda_fwd_intra(
            x.q, x.k, x.v, x.gk, x.beta, None, x.cu_seqlens, 64, chunk_indices,
            method=method, **flags,
        )  # fmt: skip


def stock_kda_emulated(x: KdaInputs) -> tuple[Tensor, ...]:
    """w, u, kg, Aqk, Akk of SGLang's unfused path with its roundings, in plain torch.

    Diagonal 16 x 16 blocks pair by pair in float32; the others from operands cut at the first row
    of the later block and rounded to bfloat16, whatever the dtype; float32 substitution on the
    diagonal blocks and tf32 merges; Akk, beta v and beta exp2(g) k rounded to the dtype.
    """
    B, T, H, K = x.k.shape
    layout = ChunkLayout.of(B, T, x.cu_seqlens, 64, x.k.device)
    q, k, v, beta = (layout.split(t).float() for t in (x.q, x.k, x.v, x.beta))
    last = layout.exists.sum(1)[:, None, None, None].expand(-1, H, 1, K) - 1
    g = layout.split(x.gk).float()
    g_last = g.gather(2, last)
    g = torch.where(layout.exists[:, None, :, None], g, g_last)
    Aqk, A = (k.new_zeros(layout.number, H, 64, 64) for _ in range(2))
    for i in range(0, 64, 16):
        rows, r = slice(i, i + 16), g[:, :, i : i + 1]
        difference = g[:, :, rows, None] - g[:, :, None, rows]
        lower = torch.ones(16, 16, dtype=torch.bool, device=k.device).tril()[..., None]
        pairs = torch.where(lower, difference, -torch.inf).exp2() * k[:, :, None, rows]
        Aqk[:, :, rows, rows] = (q[:, :, rows, None] * pairs).sum(-1)
        A[:, :, rows, rows] = (k[:, :, rows, None] * pairs).sum(-1)
        if i:
            k_j = (k[:, :, :i] * (r - g[:, :, :i]).exp2()).bfloat16().float().mT
            decay = (g[:, :, rows] - r).exp2()
            Aqk[:, :, rows, :i] = (q[:, :, rows] * decay).bfloat16().float() @ k_j
            A[:, :, rows, :i] = (k[:, :, rows] * decay).bfloat16().float() @ k_j
    Akk = invert(A.tril(-1) * beta[..., None], "FS16", "tf32rz").to(x.k.dtype)
    vb = (v * beta[..., None]).to(x.v.dtype)
    kb = (k * beta[..., None] * g.exp2()).to(x.k.dtype)
    w, u = Akk.float() @ kb.float(), Akk.float() @ vb.float()
    results = (w, u, k * (g_last - g).exp2(), Aqk.tril() * K**-0.5, Akk)
    return tuple(layout.join(t.to(x.k.dtype), B, T) for t in results)


def stock_kda(x: KdaInputs, fuse: bool) -> tuple:
    """SGLang's own kernels beside a GPU, their emulation elsewhere and where theirs overflow."""
    emulated = stock_kda_emulated(x)
    if not x.k.is_cuda:
        return emulated
    from sglang.kernels.ops.attention.fla.chunk_intra import chunk_kda_fwd_intra as stock

    indices = None if x.cu_seqlens is None else chunk_indices_of(x.cu_seqlens)
    w, u, _, kg, Aqk, Akk = stock(
        x.q, x.k, x.v, x.gk, x.beta, x.k.shape[-1] ** -0.5, x.cu_seqlens, chunk_indices=indices,
        fuse_recompute=fuse, fuse_diagonal=fuse,
    )  # fmt: skip
    found = (w, u, kg, lower(x, Aqk), emulated[4] if Akk is None else Akk)
    finite = [bool(t.isfinite().all()) for t in found]
    return tuple(t if ok else e for t, e, ok in zip(found, emulated, finite, strict=True))


def lower(x: KdaInputs, Aqk: Tensor) -> Tensor:
    """On and below the diagonal of each chunk: above it nobody reads, and nobody need write."""
    layout = ChunkLayout.of(*Aqk.shape[:2], x.cu_seqlens, 64, Aqk.device)
    ones = torch.ones(layout.number, 1, 64, 64, dtype=torch.bool, device=Aqk.device).tril()
    return torch.where(layout.join(ones, *Aqk.shape[:2]), Aqk, 0)


def check_kda(x: KdaInputs, method: str = "auto") -> dict[str, tuple[float, float]]:
    """All results within 1.2 times SGLang's error, with either choice of the fuse flags.

    The worst chunk alone is one draw of the rounding errors: twice SGLang's there. Returns
    {name: (our error, the tolerance)} of the unfused path.
    """
    truth = naive_kda_intra(x.q, x.k, x.v, x.gk, x.beta, None, x.cu_seqlens)
    worst_chunk = partial(worst_chunk_err, cu_seqlens=x.cu_seqlens)
    seen, before = {}, None
    for fuse in (True, False):
        w, u, none, kg, Aqk, Akk = run_kda(x, method, fuse_recompute=fuse, fuse_diagonal=fuse)
        assert none is None
        assert (Akk is None) is fuse
        if fuse:
            assert torch.equal(Aqk, lower(x, Aqk)), "Aqk: not zero above the diagonal"
        else:
            assert all(torch.equal(a, b) for a, b in zip(before, (w, u, kg), strict=True))
        before = (w, u, kg)
        ours = (w, u, kg, lower(x, Aqk), *(() if fuse else (Akk,)))
        stock = stock_kda(x, fuse)
        for name, a, t, s in zip(NAMES, ours, truth, stock, strict=False):
            assert a.dtype == x.k.dtype
            assert a.shape == t.shape
            assert a.isfinite().all(), f"{name}: not finite or not written"
            for error, factor in ((rel_err, 1.2), (worst_chunk, 2.0)):
                allowed = tolerance(t, s, a.dtype, factor, error)
                got = error(a, t)
                assert got <= allowed, f"{name}: {error} {got:.3e} is above {allowed:.3e}"
            seen[name] = (rel_err(a, t), tolerance(t, s, a.dtype))
    return seen


RANDOM = HARD_INPUTS["random"]
