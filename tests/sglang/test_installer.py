"""The whole installation in each release: real kernel modules, real wrapper, real flag handling."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_trinv import dispatch, install, selfcheck, status, targets
from sglang_trinv.config import Config
from tests.sglang.conftest import FUSED
from tests.sglang.stage import GDN, Anything, Stage

pytestmark = pytest.mark.filterwarnings("ignore:Triton is not supported on current platform")


@pytest.fixture(params=FUSED)
def release(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def stage(
    installed_release: str, sources: Path, target: targets.Target, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Stage]]:
    """A CPU runner of a model with GDN layers, and an op that only counts."""
    finder = Anything()
    sys.meta_path.append(finder)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch.ops, "fwd_intra", lambda k, v, *_, **__: (k, v, None))
    monkeypatch.setattr(selfcheck, "run", lambda *_: {"worst_ratio": 0.5})

    def make(**flags: Any) -> Stage:
        made = Stage(sources, target, **flags)
        made.runner.device = "cpu"
        made.runner.model_config.dtype = torch.bfloat16
        made.runner.model_config.hf_config = _hf_config(target)
        return made

    yield make
    sys.meta_path.remove(finder)


def _hf_config(target: targets.Target) -> Any:
    """A config that the release's own ``hybrid_gdn_config`` takes for a GDN model."""
    if "." not in target.gdn_config:
        return object()
    arch = importlib.import_module(target.gdn_config.rpartition(".")[0])
    text = arch.Qwen3NextConfig()
    vars(text).update(vars(GDN))
    return SimpleNamespace(get_text_config=lambda: text)


def _serve(stage: Stage, config: Config) -> install.Installer:
    """What the hook does around SGLang's wrapper."""
    installer = install.Installer()
    installer.install_once(stage.runner, config)
    installer.announce(stage.runner, stage.build())
    return installer


def test_flashinfer_by_default_is_installed_but_not_on_the_hot_path(
    stage: Callable[..., Stage], target: targets.Target, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        installer = _serve(stage(), Config())
    fields = status.current().fields
    assert fields["state"] == installer.state == "installed"
    assert fields["layers"] == {"gdn": 3, "kda": None}
    assert installer.patch.live()
    (record,) = [r for r in caplog.records if "sglang_trinv" in r.message]
    if target.prefill_default:
        assert fields["prefill_backend"] == "flashinfer"
        assert fields["on_hot_path"] is False
        assert record.levelno == logging.WARNING
        assert "installed but not on the hot path" in record.message
        assert "--linear-attn-prefill-backend triton or SGLANG_TRINV_FORCE=1" in record.message
    else:
        assert fields["on_hot_path"] is True
        assert record.message.startswith("sglang_trinv 0.1.0: GDN intra-chunk inverse replaced (")
    installer.patch.undo()


def test_force_puts_it_on_the_hot_path(
    stage: Callable[..., Stage], target: targets.Target, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        made = stage(linear_attn_prefill_backend="flashinfer")
        installer = _serve(made, Config(force=True))
        again = installer.install_once(made.runner, Config(force=True))
        installer.announce(made.runner, made.build())
    assert again == "installed"
    assert status.current().fields["on_hot_path"] is True
    ours = [r.message for r in caplog.records if "sglang_trinv" in r.message]
    assert len(ours) == 2
    assert ours[0].endswith("SGLANG_TRINV_FORCE=1: GDN prefill backend set to triton")
    assert ours[1].endswith("K128 V128, Hk2/Hv4); prefill backend triton")
    function, _ = targets.resolve(target)
    assert function is not installer.patch.stock
    installer.patch.undo()


def test_without_force_an_explicit_flag_is_never_displaced(stage: Callable[..., Stage]) -> None:
    installer = _serve(stage(linear_attn_prefill_backend="flashinfer"), Config())
    assert status.current().fields["prefill_backend"] == "flashinfer"
    installer.patch.undo()
