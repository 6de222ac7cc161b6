"""``plugin.register`` in the real plugin loader and hook registry of each release."""

from __future__ import annotations

import logging
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sglang_trinv import install, plugin, status, targets

WRAPPER = targets.ATTENTION_WRAPPER


@pytest.fixture(params=[r for r in targets.RELEASES if r not in targets.PATCHED])
def release(request: pytest.FixtureRequest) -> str:
    """The releases that have a plugin system."""
    return request.param


class EntryPoint(SimpleNamespace):
    """What ``importlib.metadata`` hands out."""

    def load(self) -> Callable[[], Any]:
        return self.function


@pytest.fixture
def loader(installed_release: str, clean_env: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """The real loader in a fake server: ``loader(other=function)`` loads plugins as SGLang does."""
    never = SimpleNamespace(get=lambda: None)
    environ = ModuleType("sglang.srt.environ")
    environ.envs = SimpleNamespace(SGLANG_PLUGINS=never, SGLANG_PLATFORM=never)
    sys.modules["sglang.srt.environ"] = environ

    registry = ModuleType(WRAPPER.rpartition(".")[0])

    def attn_backend_wrapper(runner, full_attn_backend):
        return f"{full_attn_backend} for {runner}"

    registry.attn_backend_wrapper = attn_backend_wrapper
    importer = ModuleType("sglang.srt.model_executor.importer")
    importer.attn_backend_wrapper = attn_backend_wrapper
    sys.modules[registry.__name__] = registry
    sys.modules[importer.__name__] = importer

    def load(**others: Callable[[], Any]) -> SimpleNamespace:
        from sglang.srt import plugins
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        functions = {"trinv": plugin.register, **others}
        points = [
            EntryPoint(name=name, value=name, dist=SimpleNamespace(name=name), function=function)
            for name, function in functions.items()
        ]
        clean_env.setattr(plugins, "entry_points", lambda group: points)
        plugins.load_plugins()
        plugins.load_plugins()  # SGLang calls it from several places
        return SimpleNamespace(
            registry=registry, importer=importer, HookRegistry=HookRegistry, HookType=HookType
        )

    return load


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls that reach the installer, in order."""
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(install, "install_once", lambda *a: seen.append(("install_once", *a)))
    monkeypatch.setattr(install, "announce", lambda *a: seen.append(("announce", *a)))
    return seen


def test_one_hook_wraps_the_attention_wrapper_everywhere(
    loader: Callable[..., SimpleNamespace], installs: list[tuple[Any, ...]]
) -> None:
    server = loader()
    assert list(server.HookRegistry._hooks) == [WRAPPER, targets.PREPARE_ARGUMENTS]
    ((kind, _, source),) = server.HookRegistry._hooks[WRAPPER]
    assert kind is server.HookType.AROUND
    assert source.plugin_name == "trinv"
    assert server.importer.attn_backend_wrapper is server.registry.attn_backend_wrapper
    assert server.importer.attn_backend_wrapper("runner", "full") == "full for runner"
    assert server.importer.attn_backend_wrapper(runner="r", full_attn_backend="f") == "f for r"
    config = installs[0][2]
    assert installs[:2] == [
        ("install_once", "runner", config),
        ("announce", "runner", "full for runner"),
    ]
    assert status.current().fields["state"] == "registered"
    assert status.current().fields["release"] in targets.RELEASES


def test_only_the_main_process_looks_for_an_http_server(
    loader: Callable[..., SimpleNamespace], clean_env: pytest.MonkeyPatch, sources: Path
) -> None:
    clean_env.setattr(multiprocessing, "parent_process", lambda: "the main process")
    assert list(loader().HookRegistry._hooks) == [WRAPPER]
    module, name = targets.PREPARE_ARGUMENTS.rsplit(".", 1)
    source = (sources / f"{module.replace('.', '/')}.py").read_text()
    assert f"\ndef {name}(argv: " in source
    for file in ("sglang/launch_server.py", "sglang/cli/serve.py"):
        assert f"from {module} import {name}" in (sources / file).read_text()


@pytest.mark.parametrize("kind", ["AROUND", "REPLACE"])
def test_another_plugin_on_the_same_target_nests(
    loader: Callable[..., SimpleNamespace], installs: list[tuple[Any, ...]], kind: str
) -> None:
    def other() -> None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        def around(original, runner, full):
            return f"[{original(runner, full)}]"

        def replace(runner, full):
            return f"replaced {full}"

        HookRegistry.register(WRAPPER, {"AROUND": around, "REPLACE": replace}[kind], HookType[kind])

    server = loader(other=other)
    expected = {"AROUND": "[full for runner]", "REPLACE": "replaced full"}[kind]
    assert server.importer.attn_backend_wrapper("runner", "full") == expected
    assert [call[0] for call in installs] == ["install_once", "announce"]


def test_another_plugin_that_fails_changes_nothing_for_us(
    loader: Callable[..., SimpleNamespace], installs: list[tuple[Any, ...]]
) -> None:
    def broken() -> None:
        raise ValueError("not ours")

    loader(broken=broken).importer.attn_backend_wrapper("runner", "full")
    assert len(installs) == 2


def test_switched_off_registers_nothing(
    loader: Callable[..., SimpleNamespace],
    installs: list[tuple[Any, ...]],
    clean_env: pytest.MonkeyPatch,
) -> None:
    clean_env.setenv("SGLANG_TRINV", "0")
    server = loader()
    assert not server.HookRegistry._hooks
    assert server.importer.attn_backend_wrapper("runner", "full") == "full for runner"
    assert not installs
    assert status.current().fields["state"] == "off"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SGLANG_TRINV_METHOD", "fastest"),
        ("SGLANG_TRINV", "yes"),
        ("SGLANG_TRINV_CHEKC", "3"),
    ],
)
def test_a_wrong_setting_leaves_the_loader_as_system_exit(
    loader: Callable[..., SimpleNamespace],
    clean_env: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    value: str,
) -> None:
    clean_env.setenv(name, value)
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as exit_:
        loader()
    message = exit_.value.code
    assert isinstance(message, str)  # printed by Python, which then exits with 1
    assert "\n" not in message
    assert message.startswith(f"sglang_trinv: {name}: ")
    assert not caplog.records


def test_strict_stops_at_once_on_a_release_outside_the_table(
    loader: Callable[..., SimpleNamespace], clean_env: pytest.MonkeyPatch
) -> None:
    clean_env.setenv("SGLANG_TRINV_STRICT", "1")
    sys.modules["sglang"].__version__ = "0.9.0"
    with pytest.raises(SystemExit, match="SGLang 0.9.0 is not in the table"):
        loader()
