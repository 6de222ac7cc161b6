"""What the whole prefill must satisfy, on the CPU in Triton's interpreter and on a GPU alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sglang_trinv.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from sglang_trinv.reference.inputs import constant, cosine_keys, equal_keys, g_near_0
from sglang_trinv.reference.layout import expand_heads, token_ranges
from sglang_trinv.reference.recurrence import l2norm, naive_gated_delta_rule
from tests.inputs import HARD_INPUTS, Case, Inputs, poisoned_allocations
from tests.tolerance import rel_err, stock_emulated, tolerance

RANDOM = HARD_INPUTS["random"]
ALLOWED = 1.1  # times the error of SGLang's Triton chain
# Where the rows of Ai nearly cancel in the state, so that rounding them one by one would show.
NEARER_KEYS = {
    f"cosine {cosine}, beta {beta}": Case(
        cosine_keys(cosine) if cosine < 1 else equal_keys, constant(beta), g_near_0
    )
    for cosine in (0.9996, 1)
    for beta in (0.995, 0.7, 0.3)
}


@dataclass(frozen=True)
class Call:
    """Arguments of one prefill, and a pool of states in which some slots belong to nobody."""

    x: Inputs
    pool: Tensor  # [slots, H, V, K], slots at twice the dense stride
    indices: Tensor  # int32 [N]

    @property
    def N(self) -> int:
        return self.indices.numel()

    def states(self) -> Tensor:
        """The state before each sequence, float64; zeros where the slot is negative."""
        states = self.pool[self.indices.long().clamp(min=0)].double()
        states[self.indices < 0] = 0
        return states

    def sequence(self, n: int) -> Call:
        """The n-th sequence alone."""
        bos, eos = self.x.cu_seqlens[n : n + 2].tolist()
        x = [getattr(self.x, name)[:, bos:eos] for name in ("q", "k", "v", "g", "beta")]
        starts = self.x.cu_seqlens.new_tensor([0, eos - bos])
        return Call(Inputs(*x, starts), strided(self.pool), self.indices[n : n + 1])


def prefill_call(
    case: Case, lengths: list[int], Hg: int = 1, ratio: int = 1, K: int = 64, V: int = 64,
    dtype: torch.dtype = torch.bfloat16, state: torch.dtype = torch.float32,
    skipped: int | None = None, seed: int = 3, device: str = "cpu", zeros: bool = False,
) -> Call:  # fmt: skip
    """Keys and queries of random lengths; ``skipped`` is the sequence with slot -1.

    ``zeros``: states of zeros, beside which an error in what is added to them cannot hide.
    """
    N, T, H = len(lengths), sum(lengths), Hg * ratio
    x = case.build(T, Hg=Hg, H=H, K=K, V=V, dtype=dtype, lengths=lengths, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    q, k = (
        (y.float() * (0.5 + 3 * torch.rand(1, T, Hg, 1, generator=generator))).to(dtype)
        for y in (x.q, x.k)
    )
    pool = torch.randn(N + 2, H, V, K, generator=generator).to(state) * (not zeros)
    indices = torch.randperm(N + 2, generator=generator)[:N].int()
    if skipped is not None:
        indices[skipped] = -1
    x = replace(x, q=q, k=k).to(device)
    return Call(x, strided(pool.to(device)), indices.to(device))


def strided(pool: Tensor) -> Tensor:
    """A copy with a slot stride of twice the dense one."""
    return torch.stack([pool, torch.zeros_like(pool)], 1)[:, 0]


def run_prefill(call: Call, **options: Any) -> tuple[Tensor, Tensor | None]:
    """(o, h) of the op into poisoned memory; call.pool is updated."""
    x = call.x
    with poisoned_allocations():
        o, _, h = chunk_gated_delta_rule(
            x.q, x.k, x.v, x.g, x.beta, initial_state=call.pool, initial_state_indices=call.indices,
            cu_seqlens=x.cu_seqlens, use_qk_l2norm_in_kernel=True, **options,
        )  # fmt: skip
    return o, h


def truth_of(call: Call) -> tuple[Tensor, Tensor]:
    x = call.x
    return naive_gated_delta_rule(
        x.q, x.k, x.v, x.g, x.beta, None, call.states(), x.cu_seqlens, use_qk_l2norm=True
    )


def stock_chain_emulated(call: Call) -> tuple[Tensor, Tensor]:
    """(o, final states) of SGLang's Triton chain: its kernels' roundings, in plain torch.

    q and k normalised and rounded; w, u as in ``stock_emulated``; h, v_new, the scores and v_new
    with its decay rounded where SGLang stores or multiplies them in k's dtype.
    """
    x, dtype = call.x, call.x.k.dtype

    def rounded(y: Tensor) -> Tensor:
        return y.to(dtype).float()

    H, V = x.v.shape[2:]
    K = x.k.shape[3]
    o, states = torch.zeros(x.v.shape, device=x.v.device), call.states().float()
    q, k = (expand_heads(rounded(l2norm(y.float())), H, 2)[0] for y in (x.q, x.k))
    ranges = token_ranges(1, x.v.shape[1], x.cu_seqlens)
    for n, (bos, eos) in enumerate(ranges):
        S = states[n]
        for t in range(bos, eos, 64):
            rows = slice(t, min(t + 64, eos))
            g, b_q, b_k = x.g[0, rows].cumsum(0), q[rows], k[rows]
            w, u, _ = stock_emulated(
                b_k[None].to(dtype), x.v[:, rows], g[None], x.beta[:, rows].float()
            )
            h = rounded(S)
            v_new = u[0].float() - torch.einsum("tHk,Hvk->tHv", w[0].float(), h)
            decay = (g.T[:, :, None] - g.T[:, None, :]).clamp(max=0).exp()
            P = rounded((torch.einsum("iHk,jHk->Hij", b_q, b_k) * decay).tril())
            b_o = torch.einsum("tHk,Hvk->tHv", b_q, h) * g.exp()[..., None]
            b_o += torch.einsum("Hij,jHv->iHv", P, rounded(v_new))
            o[0, rows] = b_o * K**-0.5
            v_new = rounded(v_new * (g[-1] - g).exp()[..., None])
            S = S * g[-1].exp()[:, None, None] + torch.einsum("tHk,tHv->Hvk", b_k, v_new)
        states[n] = S
    assert o.shape[3] == V
    return o.to(dtype), states.to(call.pool.dtype)


def check_prefill(
    call: Call, stock: tuple[Tensor, Tensor] | None = None, allowed: float = ALLOWED, **options: Any
) -> dict[str, tuple[float, float]]:
    """Output and states against float64, judged by stock's errors; all other slots untouched.

    Returns {name: (our error, the tolerance)}.
    """
    before, (o, states) = call.pool.clone(), truth_of(call)
    stock = stock or stock_chain_emulated(call)
    got, _ = run_prefill(call, **options)
    written = call.indices[call.indices >= 0].long()
    rest = [i for i in range(len(before)) if i not in written.tolist()]
    assert torch.equal(call.pool[rest], before[rest])
    kept = call.indices >= 0
    seen = {}
    for name, a, t, s in (
        ("o", got, o, stock[0]),
        ("state", call.pool[written], states[kept], stock[1][kept]),
    ):
        assert a.isfinite().all(), f"{name}: not finite or not written"
        # The state is kept in float32, but what is added to it was rounded to k's dtype.
        limit = tolerance(t, s, call.x.k.dtype, allowed)
        assert rel_err(a, t) <= limit, f"{name}: {rel_err(a, t):.3e} is above {limit:.3e}"
        seen[name] = (rel_err(a, t), limit)
    return seen
