"""Fixtures of the tests of dispatch, check and install."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from sglang_trinv import dispatch, selfcheck
from tests.cpu import fake_server
from tests.cpu.calls import rounded_truth
from tests.cpu.fake_server import RELEASE, TARGET


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


@pytest.fixture
def server(forget_sglang: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Modules under SGLang's names, and an op that answers at once."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch.ops, "fwd_intra", lambda k, v, *_, **__: (k, v, None))
    monkeypatch.setattr(selfcheck, "run", lambda *_: {"worst_ratio": 0.5})
    names = [*TARGET.holders, f"{TARGET.fla}.utils", TARGET.gdn_config.rpartition(".")[0]]
    packages = {name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1)}
    modules = {name: ModuleType(name) for name in sorted({*packages, *names})}
    for name in packages:
        modules[name].__path__ = []
    modules["sglang"].__version__ = RELEASE
    for name in TARGET.holders:
        setattr(modules[name], TARGET.function, fake_server.stock)
    modules[f"{TARGET.fla}.utils"].SUPPRESS_LEVEL = 0
    modules[TARGET.gdn_config.rpartition(".")[0]].hybrid_gdn_config = lambda model: model.gdn
    sys.modules.update(modules)
    return modules
