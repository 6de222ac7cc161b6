"""Installation in a process that only looks like SGLang's scheduler: how each way ends."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_trinv import dispatch, install, plugin, targets, warmup
from sglang_trinv.config import Config
from sglang_trinv.install import Installer, platform_refusal
from sglang_trinv.status import ProcessStatus

RELEASE = "0.5.20"
TARGET = targets.find(RELEASE)


def stock(k, v, g=None, beta=None, cu_seqlens=None, chunk_size=64, chunk_indices=None):
    return "w", "u", "A"


@pytest.fixture
def server(forget_sglang: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Modules under SGLang's names, and an op that answers at once."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch.ops, "fwd_intra", lambda k, v, *_, **__: (k, v, None))
    names = [*TARGET.holders, f"{TARGET.fla}.utils", TARGET.gdn_config.rpartition(".")[0]]
    packages = {name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1)}
    modules = {name: ModuleType(name) for name in sorted({*packages, *names})}
    for name in packages:
        modules[name].__path__ = []
    modules["sglang"].__version__ = RELEASE
    for name in TARGET.holders:
        setattr(modules[name], TARGET.function, stock)
    modules[f"{TARGET.fla}.utils"].SUPPRESS_LEVEL = 0
    modules[TARGET.gdn_config.rpartition(".")[0]].hybrid_gdn_config = lambda model: model.gdn
    sys.modules.update(modules)
    return modules


def runner(**changes: Any) -> SimpleNamespace:
    """A runner of Qwen3.5-27B's GDN layers on one rank of four."""
    gdn = SimpleNamespace(linear_num_key_heads=16, linear_num_value_heads=48)
    state = torch.empty(48, 2, 12, 128, 128, device="meta")
    return SimpleNamespace(
        **{
            "device": "cpu",
            "is_draft_worker": False,
            "model_config": SimpleNamespace(gdn=gdn, dtype=torch.bfloat16),
            "req_to_token_pool": SimpleNamespace(
                mamba_pool=SimpleNamespace(mamba_cache=SimpleNamespace(temporal=state))
            ),
            **changes,
        }
    )


WITHOUT_GDN = {"model_config": SimpleNamespace(gdn=None, dtype=torch.bfloat16)}


def backend(kernel: str) -> SimpleNamespace:
    made = type(kernel, (), {})()
    dispatcher = SimpleNamespace(extend_kernel=made)
    return SimpleNamespace(linear_attn_backend=SimpleNamespace(kernel_dispatcher=dispatcher))


def holders(server: dict[str, ModuleType]) -> list[Any]:
    return [getattr(server[name], TARGET.function) for name in TARGET.holders]


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


def _other_release(server: dict[str, ModuleType]) -> None:
    server["sglang"].__version__ = "0.6.0"


def _other_signature(server: dict[str, ModuleType]) -> None:
    def changed(k, v, g, beta): ...

    for name in TARGET.holders:
        setattr(server[name], TARGET.function, changed)


def _other_importer(server: dict[str, ModuleType]) -> None:
    setattr(server[TARGET.holders[1]], TARGET.function, print)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            _other_release,
            "SGLang 0.6.0 is not in the table of sglang_trinv; supported are 0.5.11 to 0.5.23",
        ),
        (_other_signature, "got (k, v, g, beta)"),
        (_other_importer, "chunk does not use"),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_refused(
    server: dict[str, ModuleType],
    process: ProcessStatus,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[dict[str, ModuleType]], None],
    reason: str,
    strict: bool,
) -> None:
    spoil(server)
    before = holders(server)
    _ends(process, caplog, runner(), Config(strict=strict), "refused", reason)
    assert holders(server) == before


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("device", ["npu", "xpu", "hpu"])
def test_refused_on_other_devices(
    server: dict[str, ModuleType],
    process: ProcessStatus,
    caplog: pytest.LogCaptureFixture,
    device: str,
    strict: bool,
) -> None:
    reason = f"device {device} is not supported, cuda is"
    _ends(process, caplog, runner(device=device), Config(strict=strict), "refused", reason)


@pytest.mark.parametrize("strict", [False, True])
def test_own_exception_is_rolled_back_and_counted(
    server: dict[str, ModuleType],
    process: ProcessStatus,
    caplog: pytest.LogCaptureFixture,
    strict: bool,
) -> None:
    config = Config(strict=strict, fault="raise_at_install")
    reason = "RuntimeError: SGLANG_TRINV_FAULT=raise_at_install"
    _ends(process, caplog, runner(), config, "failed", reason)
    assert holders(server) == [stock, stock]
    assert process.fallbacks == {f"not installed: {reason}": 1}


@pytest.mark.parametrize("strict", [False, True])
def test_warm_up_that_fails_replaces_nothing(
    server: dict[str, ModuleType],
    process: ProcessStatus,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    strict: bool,
) -> None:
    monkeypatch.setattr(warmup.ops, "fwd_intra", lambda k, v, *_, **__: (k * torch.nan, v, None))
    reason = "TrinvError: warm-up of K128 V128, Hk4/Hv12 with 1 chunks gave a non-finite result"
    _ends(process, caplog, runner(), Config(strict=strict), "failed", reason)
    assert holders(server) == [stock, stock]


def test_kernels_that_cannot_be_imported_do_not_stop_the_server(
    server: dict[str, ModuleType],
    process: ProcessStatus,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(sys.modules["sglang_trinv"], "hooks")
    monkeypatch.setitem(sys.modules, "sglang_trinv.hooks", None)
    _ends(process, caplog, runner(), Config(), "failed", "ModuleNotFoundError: ")


def _ends(
    process: ProcessStatus,
    caplog: pytest.LogCaptureFixture,
    of: SimpleNamespace,
    config: Config,
    state: str,
    reason: str,
) -> None:
    """Default: one warning, however often SGLang calls. Strict: SystemExit with one line."""
    installer = Installer()
    if config.strict:
        with pytest.raises(SystemExit) as exit_:
            installer.install_once(of, config)
        message = str(exit_.value.code)
        assert message.startswith("sglang_trinv: not installed: ")
        assert message.endswith("the server stops because SGLANG_TRINV_STRICT=1")
        assert "\n" not in message
        assert not caplog.messages
    else:
        for _ in range(2):
            assert installer.install_once(of, config) == state
            installer.announce(of, backend("TritonGDNKernel"))
        (message,) = caplog.messages
        assert message.startswith("sglang_trinv 0.1.0: not installed, SGLang's own kernels serve: ")
        assert caplog.records[0].levelno == logging.WARNING
    assert reason in message
    assert process.fields["state"] == state
    assert reason in process.fields["reason"]
    assert process.fields["on_hot_path"] is False


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


class TestPlatform:
    def test_cpu_needs_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert platform_refusal("cpu") == ""
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert "TRITON_INTERPRET=1" in platform_refusal("cpu")

    def test_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert platform_refusal("cuda") == platform_refusal("cuda:1") == ""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert platform_refusal("cuda:0") == "compute capability (7, 5) is below (8, 0)"

    def test_rocm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert platform_refusal("cuda") == "ROCm is not validated yet"


FAKE_SGLANG = "__version__ = '0.5.20'\n"


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        (
            "SGLANG_TRINV_METHOD",
            "fastest",
            "sglang_trinv: SGLANG_TRINV_METHOD: want auto, mbh_fp16, mbh_tf32, mbh_tf32x3 or "
            "mbh_bf16x3; got 'fastest'",
        ),
        ("SGLANG_TRINV", "on", "sglang_trinv: SGLANG_TRINV: want 0 or 1; got 'on'"),
    ],
)
def test_wrong_setting_ends_the_process_with_one_line(
    tmp_path: Path, name: str, value: str, line: str
) -> None:
    (tmp_path / "sglang.py").write_text(FAKE_SGLANG)
    root = Path(plugin.__file__).parents[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_TRINV")}
    env |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", name: value}
    code = "from sglang_trinv import plugin\ntry:\n plugin.register()\nexcept Exception:\n pass"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr == line + "\n"
    assert done.stdout == ""


def test_the_hook_calls_the_installer_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(install, "_installer", SimpleNamespace(
        install_once=lambda *a: seen.append(a) or "installed", announce=lambda *a: seen.append(a)
    ))  # fmt: skip
    assert install.install_once("runner", "config") == "installed"
    install.announce("runner", "backend")
    assert seen == [("runner", "config"), ("runner", "backend")]
