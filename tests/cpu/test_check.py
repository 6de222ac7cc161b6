"""SGLANG_TRINV_CHECK: the first calls against stock and float64; op and stock are fakes."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch

from sglang_trinv import check
from sglang_trinv.status import ProcessStatus
from tests.cpu.calls import intra_call, rounded_truth, run


def test_first_calls_are_compared_and_no_more(op: Any, stock: Any, process: ProcessStatus) -> None:
    for T in (70, 64, 1, 130):
        run(intra_call(T, Hg=2, H=4), stock, check=3)
    totals = process.check
    assert (totals["done"], totals["disagreements"], totals["skipped"]) == (3, 0, 0)
    assert stock.calls == 3
    assert totals["worst"] == {"w": 0.0, "u": 0.0}  # the fakes are equal
    assert totals["worst_error"]["ours"] == totals["worst_error"]["stock"]
    assert 0 < totals["worst_error"]["ours"]["w"] < 2.0**-8
    assert totals["worst_ratio"] == pytest.approx(1 / check.SLACK)
    assert totals["worst_ratio"] * totals["tolerance"] <= 2.0**-8


def test_a_wrong_result_is_a_disagreement(
    op: Any, stock: Any, process: ProcessStatus, caplog: pytest.LogCaptureFixture
) -> None:
    op(lambda *call, **_: rounded_truth(list(call), scale=1.02))
    with caplog.at_level(logging.WARNING):
        run(intra_call(), stock, check=1)
    totals = process.check
    assert totals["disagreements"] == 1
    assert totals["worst"]["u"] == pytest.approx(0.02, rel=0.1)
    assert totals["worst_error"]["ours"]["u"] == pytest.approx(0.02, rel=0.1)
    assert totals["worst_ratio"] > 5
    assert "check: error of u is 0.02, more than 0.002" in caplog.text


def test_the_negative_control_is_a_disagreement(
    op: Any, stock: Any, process: ProcessStatus
) -> None:
    run(intra_call(), stock, check=1, fault="zero_u")
    assert process.check["disagreements"] == 1
    assert process.check["worst_error"]["ours"]["u"] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_result_that_is_not_finite_is_a_disagreement(
    op: Any, stock: Any, process: ProcessStatus, bad: float
) -> None:
    def op_with_hole(*call: Any, **_: Any) -> tuple[Any, ...]:
        w, u, A = rounded_truth(list(call))
        u[0, 5, 1, 3] = bad
        return w, u, A

    op(op_with_hole)
    run(intra_call(), stock, check=1)
    assert process.check["disagreements"] == process.check["non_finite"] == 1
    assert process.to_dict()["check"]["worst_error"]["ours"]["u"] == 0.0  # JSON has no NaN


def test_rows_of_no_sequence_do_not_count(op: Any, stock: Any, process: ProcessStatus) -> None:
    def op_with_garbage(*call: Any, **_: Any) -> tuple[Any, ...]:
        w, u, A = rounded_truth(list(call))
        w[:, 60:] = u[:, 60:] = math.nan
        return w, u, A

    op(op_with_garbage)
    call = intra_call(70)
    call[4] = torch.tensor([0, 20, 60], dtype=torch.int32)
    run(call, stock, check=1)
    assert (process.check["done"], process.check["disagreements"]) == (1, 0)


def test_no_tokens_and_equal_lengths(op: Any, stock: Any, process: ProcessStatus) -> None:
    empty = intra_call(0)
    run(empty, stock, check=9)
    batch = intra_call(70)
    batch[4] = None
    run(batch, stock, check=9)
    assert (process.check["done"], process.check["disagreements"]) == (2, 0)


def test_stock_that_is_not_finite_sets_no_limit(op: Any, process: ProcessStatus) -> None:
    def broken_stock(*call: Any) -> tuple[Any, ...]:
        w, u, A = rounded_truth(list(call))
        return w * math.nan, u * math.nan, A

    run(intra_call(), broken_stock, check=1)
    assert (process.check["done"], process.check["disagreements"]) == (1, 0)


def test_a_check_that_fails_does_not_fail_theintra_call(
    op: Any, process: ProcessStatus, caplog: pytest.LogCaptureFixture
) -> None:
    def broken_stock(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    w, _, _ = run(intra_call(), broken_stock, check=1)
    assert w.isfinite().all()
    assert (process.check["done"], process.check["skipped"]) == (0, 1)
    assert "check skipped: OutOfMemoryError: no room" in caplog.text


def test_never_while_a_cuda_graph_is_captured(
    stock: Any, process: ProcessStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    class OnTheGpu:
        is_cuda = True

    check.first_calls("fwd_intra", (OnTheGpu(),), (), stock, 1)
    assert (process.check["done"], process.check["skipped"]) == (0, 1)
    assert stock.calls == 0
