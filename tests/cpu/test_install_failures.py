"""Installation where something is wrong: what is said, what is left, and how the process ends."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sglang_trinv import plugin, warmup
from sglang_trinv.config import Config
from sglang_trinv.install import Installer, platform_refusal
from sglang_trinv.status import ProcessStatus
from tests.cpu.fake_server import TARGET, backend, holders, runner, stock


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
            "SGLang 0.6.0 is not in the table of sglang_trinv; supported are 0.5.9 to 0.5.23",
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
            "sglang_trinv: SGLANG_TRINV_METHOD: want auto, mbh_fp16, mbh_fp16x2, mbh_tf32, "
            "mbh_tf32x3 or mbh_bf16x3; got 'fastest'",
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
