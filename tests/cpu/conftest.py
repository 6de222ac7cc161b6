"""Fixtures of the tests of dispatch and check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sglang_trinv import dispatch
from tests.cpu.calls import rounded_truth


@pytest.fixture
def stock() -> Callable[..., Any]:
    """SGLang's function: counts its calls, marks its results."""

    def answer(*call: Any) -> tuple[Any, ...]:
        answer.calls += 1
        w, u, _ = rounded_truth(list(call))
        return w, u, "stock"

    answer.calls = 0
    return answer


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    def inject(function: Callable[..., Any]) -> None:
        monkeypatch.setattr(dispatch.ops, "fwd_intra", function)

    inject(lambda *call, method, return_A: rounded_truth(list(call)))
    return inject
