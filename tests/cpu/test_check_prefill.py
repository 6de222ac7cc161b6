"""SGLANG_TRINV_CHECK of the whole prefill: states before the call, SGLang's chain, float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_trinv import dispatch, ops, prefill
from sglang_trinv.config import Config
from sglang_trinv.reference.recurrence import naive_gated_delta_rule
from sglang_trinv.status import ProcessStatus

STARTS = torch.tensor([0, 20, 27, 70], dtype=torch.int32)
SLOTS = torch.tensor([3, -1, 1], dtype=torch.int32)
BACKEND = SimpleNamespace(forward_metadata=SimpleNamespace(has_mamba_track_mask=False))


def answer(q, k, v, g, beta, *, ssm_states, cache_indices, query_start_loc, in_place=True):
    """The float64 result, rounded, and the states of the pool brought up to date."""
    before = ssm_states[cache_indices.clamp(min=0).long()]
    o, after = naive_gated_delta_rule(
        q, k, v, g, beta, None, before, query_start_loc, use_qk_l2norm=True
    )
    kept = cache_indices >= 0
    if in_place:
        ssm_states[cache_indices[kept].long()] = after[kept].to(ssm_states)
    return o.to(v.dtype)


class Chain:
    """SGLang's kernel, which counts how often it is asked; its intra-chunk step is hooked."""

    asked = 0

    def extend(self, *tensors: Any, **pool: Any) -> tuple[Any, ...]:
        Chain.asked += 1
        assert dispatch._only_stock
        assert (pool["cache_indices"] >= 0).all()
        return answer(*tensors, **pool), None, None


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In the op's place: the truth, with what the returned dictionary says done to it."""
    spoil: dict[str, Any] = {"o": lambda x: x, "state": lambda x: x}

    def fake(*tensors: Any, initial_state, initial_state_indices, cu_seqlens, **options: Any):
        o = answer(
            *tensors, ssm_states=initial_state, cache_indices=initial_state_indices,
            query_start_loc=cu_seqlens, in_place=options["inplace_update"],
        )  # fmt: skip
        initial_state[3] = spoil["state"](initial_state[3])
        return spoil["o"](o), None, None

    monkeypatch.setattr(ops, "chunk_gated_delta_rule", fake)
    monkeypatch.setattr(Chain, "asked", 0)
    return spoil


def call(checked: int = 9, **options: Any) -> torch.Tensor:
    """One call; the pool after it."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(1, 70, *size, generator=generator)

    kernel = prefill.kernel_class(Chain)(BACKEND, Config(gdn="full", check=checked), "triton", True)
    q, k, v = (random(h, 16).bfloat16() for h in (1, 1, 2))
    pool = torch.randn(4, 2, 16, 16, generator=generator)
    kernel.extend(
        q, k, v, -random(2).square(), random(2).sigmoid(), ssm_states=pool, cache_indices=SLOTS,
        query_start_loc=STARTS, **options,
    )  # fmt: skip
    return pool


def test_a_right_answer_agrees_and_no_more_than_wanted_are_checked(
    op: Any, process: ProcessStatus
) -> None:
    pools = [call(checked=2) for _ in range(3)]
    assert Chain.asked == 2
    totals = process.check
    assert (totals["done"], totals["disagreements"], totals["skipped"]) == (2, 0, 0)
    assert 0 < totals["worst_error"]["ours"]["o"] < 2.0**-8
    assert totals["worst"]["o"] == totals["worst"]["state"] == 0.0  # both are the rounded truth
    assert torch.equal(pools[0], pools[2])  # a check leaves the pool alone
    assert sum(process.calls[prefill.OP].values()) == 3


@pytest.mark.parametrize("name", ["o", "state"])
def test_a_wrong_answer_is_a_disagreement(op: Any, process: ProcessStatus, name: str) -> None:
    op[name] = lambda x: x * 1.05
    call()
    assert process.check["disagreements"] == 1
    other = {"o": "state", "state": "o"}[name]
    worst = process.check["worst_error"]["ours"]
    assert worst[name] > 0.02
    assert worst[other] < 2.0**-8


def test_nan_is_a_disagreement(op: Any, process: ProcessStatus) -> None:
    op["o"] = lambda x: x * float("nan")
    call()
    assert process.check["non_finite"] == process.check["disagreements"] == 1


def test_what_belongs_to_no_slot_does_not_count(op: Any, process: ProcessStatus) -> None:
    def garbage(o: torch.Tensor) -> torch.Tensor:
        o[:, 20:27] = float("nan")
        return o

    op["o"] = garbage
    call()
    assert (process.check["done"], process.check["disagreements"]) == (1, 0)


def test_states_that_are_not_to_be_written_are_not_compared(
    op: Any, process: ProcessStatus
) -> None:
    call(inplace_update=False)
    assert (process.check["done"], process.check["disagreements"]) == (1, 0)
    assert "state" not in process.check["worst"]


def test_a_chain_that_fails_does_not_fail_the_call(
    op: Any, process: ProcessStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chain, "extend", lambda *_, **__: 1 / 0)
    call()
    assert (process.check["done"], process.check["skipped"]) == (0, 1)
    assert process.fallbacks == {}
    assert not dispatch._only_stock
