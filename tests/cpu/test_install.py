"""Installation in a process that only looks like SGLang's scheduler: how each way ends."""

from __future__ import annotations

import logging
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_trinv import dispatch, install
from sglang_trinv.config import Config
from sglang_trinv.install import Installer
from sglang_trinv.status import ProcessStatus
from tests.cpu.fake_server import TARGET, WITHOUT_GDN, backend, holders, runner, stock


def test_installs_once_and_says_it_once(
    server: dict[str, ModuleType], process: ProcessStatus, caplog: pytest.LogCaptureFixture
) -> None:
    installer = Installer()
    with caplog.at_level(logging.INFO):
        for _ in range(3):  # target runner, and the children of two-batch overlap
            assert installer.install_once(runner(), Config()) == "installed"
            installer.announce(runner(), backend("TritonGDNKernel"))
    first, second = holders(server)
    assert first is second is not stock
    assert first.__wrapped__ is stock  # one layer, not three
    assert caplog.messages == [
        "sglang_trinv 0.1.0: GDN intra-chunk inverse replaced (method None, cpu, Triton "
        "interpreter, K128 V128, Hk4/Hv12); prefill backend triton"
    ]
    fields = process.to_dict()
    assert fields["state"] == "installed"
    assert fields["layers"] == {"gdn": 48, "kda": None}
    assert fields["on_hot_path"] is True
    assert fields["hooks"] == [
        {"target": TARGET.dotted, "importers": [TARGET.holders[1]], "live": True}
    ]
    for name in TARGET.holders:
        setattr(server[name], TARGET.function, stock)
    assert process.to_dict()["hooks"][0]["live"] is False  # looked up, not remembered


def test_draft_runner_adds_nothing(
    server: dict[str, ModuleType], process: ProcessStatus, caplog: pytest.LogCaptureFixture
) -> None:
    installer = Installer()
    installer.install_once(runner(), Config())
    installer.announce(runner(), backend("TritonGDNKernel"))
    draft = runner(is_draft_worker=True, req_to_token_pool=None)
    assert installer.install_once(draft, Config()) == "installed"
    installer.announce(draft, backend("FlashInferGDNKernel"))
    assert process.fields["prefill_backend"] == "triton"
    plain = runner(is_draft_worker=True, **WITHOUT_GDN)
    assert installer.install_once(plain, Config()) == "installed"
    assert process.fields["state"] == "installed"


@pytest.mark.parametrize(
    ("changes", "settings", "reason"),
    [
        (WITHOUT_GDN, {}, "the model has no Gated DeltaNet layer"),
        (WITHOUT_GDN, {"strict": True}, "the model has no Gated DeltaNet layer"),
        ({**WITHOUT_GDN, "device": "npu"}, {}, "the model has no Gated DeltaNet layer"),
        ({}, {"gdn": "off"}, "SGLANG_TRINV_GDN=off"),
        ({}, {"gdn": "off", "strict": True}, "SGLANG_TRINV_GDN=off"),
    ],
)
def test_idle(
    server: dict[str, ModuleType],
    process: ProcessStatus,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    settings: dict[str, Any],
    reason: str,
) -> None:
    installer = Installer()
    with caplog.at_level(logging.INFO):
        assert installer.install_once(runner(**changes), Config(**settings)) == "idle"
        installer.announce(runner(**changes), "full attention")
    assert (process.fields["state"], process.fields["reason"]) == ("idle", reason)
    assert caplog.messages == [f"sglang_trinv 0.1.0: idle: {reason}"]
    assert holders(server) == [stock, stock]


def test_idle_ends_when_a_runner_with_gdn_comes(
    server: dict[str, ModuleType], process: ProcessStatus
) -> None:
    installer = Installer()
    installer.install_once(runner(**WITHOUT_GDN), Config())
    assert installer.install_once(runner(), Config()) == "installed"


@pytest.mark.parametrize(
    ("kernel", "advice"),
    [
        ("FlashInferGDNKernel", "triton or SGLANG_TRINV_FORCE=1"),
        ("CuteDSLGDNKernel", "--linear-attn-prefill-backend triton"),
        ("SomethingElse", "--linear-attn-prefill-backend triton"),
    ],
)
def test_another_prefill_backend_is_a_warning(
    server: dict[str, ModuleType],
    process: ProcessStatus,
    caplog: pytest.LogCaptureFixture,
    kernel: str,
    advice: str,
) -> None:
    installer = Installer()
    installer.install_once(runner(), Config())
    installer.announce(runner(), backend(kernel))
    (message,) = caplog.messages
    assert "installed but not on the hot path: SGLang's GDN prefill backend is " in message
    assert message.endswith(advice)
    assert process.fields["on_hot_path"] is False
    assert process.fields["prefill_backend"] in ("flashinfer", "cutedsl", "unknown")


def test_only_rank_0_speaks(
    server: dict[str, ModuleType],
    process: ProcessStatus,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with caplog.at_level(logging.INFO):
        Installer().install_once(runner(**WITHOUT_GDN), Config())
    assert not caplog.messages


def test_suppress_level_three_asks_for_the_third_result(
    server: dict[str, ModuleType], process: ProcessStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    server[f"{TARGET.fla}.utils"].SUPPRESS_LEVEL = 3
    seen = []

    def op(k, v, *_, method, return_A):
        seen.append(return_A)
        return k, v, "A"

    monkeypatch.setattr(dispatch.ops, "fwd_intra", op)
    Installer().install_once(runner(), Config())
    k = torch.zeros(1, 1, 4, 16).bfloat16()
    assert holders(server)[1](k, k, k, k, None)[2] == "A"
    assert seen == [True, True]  # the warm-up as well


def test_the_hook_calls_the_installer_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(install, "_installer", SimpleNamespace(
        install_once=lambda *a: seen.append(a) or "installed", announce=lambda *a: seen.append(a)
    ))  # fmt: skip
    assert install.install_once("runner", "config") == "installed"
    install.announce("runner", "backend")
    assert seen == [("runner", "config"), ("runner", "backend")]
