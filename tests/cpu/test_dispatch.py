"""Who answers a call, and what is counted; the op itself is a fake."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from sglang_trinv import dispatch, hooks, targets
from sglang_trinv.config import Config
from sglang_trinv.dispatch import Choice, choose
from sglang_trinv.errors import UnsupportedCall
from sglang_trinv.status import ProcessStatus
from tests.cpu.calls import intra_call, rounded_truth, run

GOOD = {
    "dtype": torch.bfloat16,
    "chunk_size": 64,
    "K": 128,
    "V": 128,
    "contiguous": True,
    "device": "cuda",
    "capability": (9, 0),
}


class TestChoose:
    def test_a_call_of_a_real_model_is_ours(self) -> None:
        assert choose(**GOOD) == Choice("fwd_intra")
        assert choose(**{**GOOD, "dtype": torch.float16, "K": 64, "V": 256}).impl == "fwd_intra"
        assert choose(**{**GOOD, "device": "cpu", "capability": None}).impl == "fwd_intra"

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"dtype": torch.float32}, "dtype float32 is not a 16-bit float"),
            ({"chunk_size": 32}, "chunk_size 32 is not 64"),
            ({"K": 100}, "head dims 100 and 128 are not multiples of 16"),
            ({"V": 8}, "head dims 128 and 8 are not multiples of 16"),
            ({"contiguous": False}, "k, v, g or beta is not contiguous"),
            ({"device": "xpu"}, "device xpu is not cuda or cpu"),
            ({"capability": (7, 5)}, "compute capability (7, 5) is below (8, 0)"),
        ],
    )
    def test_anything_else_is_stock_with_a_reason(
        self, change: dict[str, Any], reason: str
    ) -> None:
        assert choose(**{**GOOD, **change}) == Choice("stock", reason)

    def test_reads_metadata_only(self) -> None:
        """Meta tensors have no values: a look at one would raise."""
        call = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in intra_call()]
        assert dispatch._choose(tuple(call)) == Choice("stock", "device meta is not cuda or cpu")


class TestRun:
    def test_ours_is_counted_by_implementation(
        self,
        op: Any,
        stock: Any,
        process: ProcessStatus,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        w, u, A = run(intra_call(), stock)
        assert (w.shape, u.shape, A) == ((1, 70, 2, 16), (1, 70, 2, 32), None)
        assert process.calls["fwd_intra"] == {"triton-interpreter": 1}
        monkeypatch.delenv("TRITON_INTERPRET")
        run(intra_call(), stock)
        assert process.calls["fwd_intra"] == {"triton-interpreter": 1, "torch": 1}
        assert stock.calls == 0
        assert not process.fallbacks

    def test_method_and_third_result_reach_the_op(
        self, op: Any, stock: Any, process: ProcessStatus
    ) -> None:
        seen = {}
        op(lambda *call, **options: seen.update(options) or rounded_truth(list(call)))
        dispatch.fwd_intra(
            tuple(intra_call()), stock=stock, config=Config(method="mbh_tf32"), return_A=True
        )
        assert seen == {"method": "mbh_tf32", "return_A": True}

    def test_a_choice_of_stock_is_counted_and_logged_once(
        self, op: Any, stock: Any, process: ProcessStatus, caplog: pytest.LogCaptureFixture
    ) -> None:
        call = intra_call(dtype=torch.float32)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert run(call, stock)[2] == "stock"
        assert process.fallbacks == {"dtype float32 is not a 16-bit float": 3}
        assert stock.calls == 3
        assert [r.message for r in caplog.records] == [
            "sglang_trinv: SGLang's own kernel answers: dtype float32 is not a 16-bit float"
        ]
        assert not process.calls["fwd_intra"]

    def test_non_contiguous_keys_go_to_stock(
        self, op: Any, stock: Any, process: ProcessStatus
    ) -> None:
        call = intra_call()
        call[0] = call[0].expand(2, -1, -1, -1)[:1].transpose(1, 3).contiguous().transpose(1, 3)
        assert run(call, stock)[2] == "stock"
        assert list(process.fallbacks) == ["k, v, g or beta is not contiguous"]

    def test_what_the_op_refuses_goes_to_stock_with_its_reason(
        self, op: Any, stock: Any, process: ProcessStatus
    ) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise UnsupportedCall("beta: want a tensor, got NoneType")

        op(refuse)
        assert run(intra_call(), stock)[2] == "stock"
        assert process.fallbacks == {"beta: want a tensor, got NoneType": 1}

    def test_what_breaks_the_op_goes_to_stock_too(
        self, op: Any, stock: Any, process: ProcessStatus
    ) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("no kernel\nimage " + "x" * 1000)

        op(broken)
        assert run(intra_call(), stock)[2] == "stock"
        (reason,) = process.fallbacks
        assert reason == "RuntimeError: no kernel"

    def test_strict_raises_instead_of_falling_back(
        self, op: Any, stock: Any, process: ProcessStatus
    ) -> None:
        with pytest.raises(UnsupportedCall, match="cannot answer this call: dtype float32"):
            run(intra_call(dtype=torch.float32), stock, strict=True)

        def broken(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError("in the op")

        op(broken)
        with pytest.raises(ZeroDivisionError):
            run(intra_call(), stock, strict=True)
        assert stock.calls == 0
        assert process.fallbacks == {"dtype float32 is not a 16-bit float": 1}

    def test_negative_control_zeroes_u(self, op: Any, stock: Any, process: ProcessStatus) -> None:
        w, u, _ = run(intra_call(), stock, fault="zero_u")
        assert not u.any()
        assert w.any()

    def test_adapter_hands_positional_and_keyword_arguments_on(
        self, op: Any, stock: Any, process: ProcessStatus
    ) -> None:
        seen = []
        op(lambda *call, **_: seen.append(call) or rounded_truth(list(call)))
        adapter = hooks.fwd_intra_adapter(stock, Config())
        k, v, g, beta, cu_seqlens, *_ = intra_call()
        adapter(k=k, v=v, g=g, beta=beta, cu_seqlens=cu_seqlens, chunk_indices=None)
        adapter(k, v, g, beta, cu_seqlens, 64)
        assert seen == [(k, v, g, beta, cu_seqlens, 64, None)] * 2
        assert targets.REQUIRED not in seen[0]
