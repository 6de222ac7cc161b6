"""Resolve, replace and take back the function in the real kernel modules of every release."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from sglang_trinv import dispatch, hooks, status, targets
from sglang_trinv.config import Config
from sglang_trinv.errors import TargetMissing, TrinvError
from tests.sglang.conftest import FUSED

pytestmark = pytest.mark.filterwarnings("ignore:Triton is not supported on current platform")


def test_resolves_to_the_function_that_sglang_calls(
    installed_release: str, target: targets.Target
) -> None:
    function, modules = targets.resolve(target)
    assert [module.__name__ for module in modules] == list(target.holders)
    assert all(getattr(module, target.function) is function for module in modules)
    assert targets.find(installed_release) is target


@pytest.mark.parametrize("release", FUSED)
def test_sglangs_own_caller_reaches_the_adapter(
    installed_release: str, target: targets.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, modules = targets.resolve(target)
    patch = hooks.Patch(target, modules, stock)
    seen = []

    def op(k, v, g, beta, cu_seqlens, chunk_size, chunk_indices, *, method, return_A):
        seen.append((chunk_size, cu_seqlens, chunk_indices, method, return_A))
        return k + 1, v + 2, None

    monkeypatch.setattr(dispatch.ops, "fwd_intra", op)
    patch.apply(hooks.fwd_intra_adapter(stock, Config()))
    assert patch.describe() == [
        {"target": target.dotted, "importers": [target.holders[1]], "live": True}
    ]
    chunk = modules[1]
    monkeypatch.setattr(chunk, "chunk_local_cumsum", lambda g, **_: g)
    monkeypatch.setattr(chunk, "chunk_gated_delta_rule_fwd_h", lambda k, w, u, **_: (w, u))
    monkeypatch.setattr(chunk, "chunk_fwd_o", lambda q, k, v, h, **_: (v, h))
    x = torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16)
    gate = torch.zeros(1, 4, 1)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    _, o, A, *_ = chunk.chunk_gated_delta_rule_fwd(
        x, x, x, gate, gate, 1.0, None, None, cu_seqlens, cu_seqlens
    )
    u, w = o
    assert (w == 1).all()
    assert (u == 2).all()
    assert A is None
    assert seen == [(64, cu_seqlens, cu_seqlens, "auto", False)]
    assert status.current().calls["fwd_intra"]["triton-interpreter"] == 1
    patch.undo()
    assert not patch.live()
    assert chunk.chunk_gated_delta_rule_fwd_intra is stock


@pytest.mark.parametrize("release", ["0.5.11", "0.5.23"])
class TestDifferentSources:
    """The checks at install, against sources that are not as the table says."""

    def test_changed_signature(
        self, installed_release: str, target: targets.Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def changed(k, v, g=None, beta=None, cu_seqlens=None, chunk_size=128, *, extra=None): ...

        _, modules = targets.resolve(target)
        for module in modules:
            monkeypatch.setattr(module, target.function, changed)
        with pytest.raises(TargetMissing, match=r"want \(k, v, .*got \(k, v, .*chunk_size=128, ex"):
            targets.resolve(target)

    def test_wrapper_that_keeps_the_signature_is_accepted(
        self, installed_release: str, target: targets.Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stock, modules = targets.resolve(target)

        def wrapper(*args, **kwargs):
            return stock(*args, **kwargs)

        wrapper.__wrapped__ = stock  # as SGLang's registry leaves another plugin's hook
        for module in modules:
            monkeypatch.setattr(module, target.function, wrapper)
        assert targets.resolve(target)[0] is wrapper

    def test_importer_that_uses_another_function(
        self, installed_release: str, target: targets.Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, modules = targets.resolve(target)
        monkeypatch.setattr(modules[1], target.function, lambda: None)
        with pytest.raises(TargetMissing, match="chunk does not use"):
            targets.resolve(target)

    def test_missing_module_and_function(
        self, installed_release: str, target: targets.Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(TargetMissing, match="cannot import sglang.elsewhere"):
            targets.resolve(dataclasses.replace(target, fla="sglang.elsewhere"))
        gone = dataclasses.replace(target, function="gone")
        with pytest.raises(TargetMissing, match="chunk_fwd.gone does not exist"):
            targets.resolve(gone)

    def test_setattr_that_fails_half_way_is_rolled_back(
        self, installed_release: str, target: targets.Target
    ) -> None:
        stock, modules = targets.resolve(target)
        patch = hooks.Patch(target, modules, stock)
        adapter = hooks.fwd_intra_adapter(stock, Config())
        with pytest.raises(RuntimeError, match="raise_at_install"):
            patch.apply(adapter, "raise_at_install")
        assert all(getattr(module, target.function) is stock for module in modules)
        stubborn = SimpleNamespace(__name__="stubborn", **{target.function: property})
        with pytest.raises(TrinvError, match="not live"):
            hooks.Patch(target, (*modules, _ReadOnly(stubborn)), stock).apply(adapter)
        assert modules[1].chunk_gated_delta_rule_fwd_intra is stock


class _ReadOnly:
    """A module whose attributes do not take."""

    def __init__(self, module: object) -> None:
        vars(self).update(vars(module))

    def __setattr__(self, name: str, value: object) -> None:
        pass


def test_a_later_wrapper_around_ours_still_counts_as_live() -> None:
    adapter = hooks.fwd_intra_adapter(lambda: None, Config())

    def other(*args):
        return adapter(*args)

    assert hooks.is_ours(adapter)
    assert not hooks.is_ours(other)
    other.__wrapped__ = adapter
    assert hooks.is_ours(other)
    assert not hooks.is_ours(None)
    assert not hooks.is_ours(len)
