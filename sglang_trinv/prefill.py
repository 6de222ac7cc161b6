"""The whole GDN prefill in SGLang's place: a kernel object, and when it is the faster one.

SGLang calls ``kernel_dispatcher.extend_kernel.extend(...)``. Ours is a subclass of its own
``TritonGDNKernel``, so that a call outside our op's contract is answered by SGLang's Triton chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sglang_trinv import check, dispatch, inject, ops
from sglang_trinv.config import Config

OP = "chunk_gated_delta_rule"


@dataclass(frozen=True)
class Win:
    """Calls that ours answers faster than SGLang's choice, as measured."""

    capability: tuple[int, int]
    instead_of: str  # "triton" or "flashinfer"
    heads: tuple[tuple[int, int], ...]  # (key heads, value heads) of a rank
    least_tokens: int  # of a call
    evidence: tuple[str, ...]  # files of benchmarks/results


# Ours was the faster one in every row of the evidence: calls of 1 to 131072 tokens. As its rows for
# "flashinfer" start at one token, ours displaces SGLang's own choice of it (install_full.displace).
EVIDENCE = ("prefill-h200.json", "prefill-short-h200.json")
HEADS = ((2, 4), (4, 8), (8, 16), (8, 32), (16, 16), (16, 32), (16, 48), (16, 64))
WINS: tuple[Win, ...] = (
    Win((9, 0), "triton", HEADS, 1, EVIDENCE),
    Win((9, 0), "flashinfer", HEADS, 1, EVIDENCE),
)


def wins(
    capability: tuple[int, int], instead_of: str, heads: tuple[int, int], tokens: int | None = None
) -> bool:
    """Whether ours is the faster one; without ``tokens``: for calls of some length."""
    return any(
        (win.capability, win.instead_of) == (capability, instead_of)
        and heads in win.heads
        and (tokens is None or tokens >= win.least_tokens)
        for win in WINS
    )


def displaced(capability: tuple[int, int], instead_of: str) -> list[tuple[int, int]]:
    """Heads of a rank for which ours takes the place of SGLang's choice in calls of any length."""
    listed = {heads for win in WINS for heads in win.heads}
    return sorted(heads for heads in listed if wins(capability, instead_of, heads, tokens=1))


def kernel_class(stock: type) -> type:
    """Ours as a subclass of SGLang's ``TritonGDNKernel``."""

    class TrinvGDNKernel(stock):
        uses_state_checkpoints = False
        supports_track_state_snapshot = True

        def __init__(self, backend: Any, config: Config, instead_of: str, invariant: bool) -> None:
            super().__init__()
            self.backend, self.check = backend, config.check
            # What is checked is the whole call, whose states are gone once it is answered.
            self.config = config.model_copy(update={"check": 0})
            self.instead_of, self.invariant = instead_of, invariant

        def extend(self, q, k, v, g, beta, *, ssm_states, cache_indices, query_start_loc, **kwargs):
            tensors = (q, k, v, g, beta)
            pool = {
                "ssm_states": ssm_states,
                "cache_indices": cache_indices,
                "query_start_loc": query_start_loc,
            }

            def stocks() -> Any:
                result = self.chain(tensors, pool, **kwargs)
                _snapshot(result[2], query_start_loc, kwargs)
                return result

            return extend(self, tensors, pool, kwargs, stocks)

        def chain(self, tensors, pool, **kwargs):
            """SGLang's own answer."""
            return stock.extend(self, *tensors, **pool, **kwargs)

    return TrinvGDNKernel


def extend(kernel: Any, tensors: tuple[Any, ...], pool: dict[str, Any], kwargs: Any, stocks: Any):
    """Answer one call of ``extend``; ``stocks`` is SGLang's chain for the same call.

    Returns:
        (o, None, h): h only where SGLang will read it and has given no ``track_state``.
    Raises:
        UnsupportedCall: in strict mode, in place of a call that stock would answer.
    """
    config, v = kernel.config, tensors[2]
    track = kwargs.get("track_state")

    def run() -> Any:
        dispatch.refuse(v.device, config)
        before = _states(pool) if check.due(kernel.check) else None
        o, _, h = ops.chunk_gated_delta_rule(
            *tensors,
            initial_state=pool["ssm_states"],
            initial_state_indices=pool["cache_indices"],
            cu_seqlens=pool["query_start_loc"],
            use_qk_l2norm_in_kernel=True,
            inplace_update=kwargs.get("inplace_update", True),
            method=config.method,
            return_h=track is None and _tracks(kernel.backend),
            track_state=track,
            track_chunk_idx=kwargs.get("track_chunk_idx"),
            batch_invariant=kernel.invariant,
        )
        inject.after_call(config.fault, o)
        if before is not None:
            _check(kernel, tensors, pool, before, o, kwargs.get("inplace_update", True))
        return o, None, h

    if v.is_cuda and config.gdn == "auto":
        heads = tensors[1].shape[2], v.shape[2]
        if not wins(dispatch.capability_of(v.device.index), kernel.instead_of, heads, v.shape[1]):
            return stocks()
    return dispatch.answer(OP, run, v.device, (), stocks, config)


def _states(pool: dict[str, Any]) -> torch.Tensor:
    """The states of a batch, before or after it, as a pool of their own."""
    return pool["ssm_states"][pool["cache_indices"].clamp(min=0).long()]


def _check(
    kernel: Any, tensors: Any, pool: Any, before: torch.Tensor, o: torch.Tensor, in_place: bool
) -> None:
    """SGLANG_TRINV_CHECK of one call; SGLang's chain starts from the same states."""
    kept, starts = pool["cache_indices"] >= 0, pool["query_start_loc"]

    def theirs(*_: Any) -> tuple[torch.Tensor, ...]:
        # A slot for every sequence: SGLang's kernels take no negative one.
        slots = torch.arange(len(kept), dtype=torch.int32, device=kept.device)
        own = {"ssm_states": before.clone(), "cache_indices": slots, "query_start_loc": starts}
        with dispatch.only_stock():
            result = kernel.chain(tensors, own)
        return result[0], own["ssm_states"]

    ours = (o, _states(pool)) if in_place else (o,)
    call = (*tensors, before, starts, kept)
    check.first_calls(OP, call, ours, theirs, kernel.check)


def _tracks(backend: Any) -> bool:
    """Whether SGLang copies states of this batch for its prefix cache; unknown means yes."""
    metadata = getattr(backend, "forward_metadata", None)
    return bool(getattr(metadata, "has_mamba_track_mask", True))


def _snapshot(h: Any, starts: torch.Tensor, kwargs: dict[str, Any]) -> None:
    """What SGLang's chain leaves undone for a kernel that promises snapshots: take them from h."""
    track, chunks = kwargs.get("track_state"), kwargs.get("track_chunk_idx")
    if track is None:
        return
    counts = (starts.diff() + 63) // 64
    rows = counts.cumsum(0) - counts + chunks.clamp(min=0)
    wanted = (chunks >= 0) & (chunks < counts)
    found = h[0][torch.where(wanted, rows, 0).long()].to(track.dtype)
    track.copy_(torch.where(wanted[:, None, None, None], found, track))
