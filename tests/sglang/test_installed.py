"""The SGLang that is installed here, really imported, finds the plugin by its entry point."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from sglang_trinv import targets

PROBE = """
import importlib, json
from sglang.srt.plugins import load_plugins
load_plugins()
import sglang
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang_trinv import hooks, status, targets
from sglang_trinv.config import Config
target = targets.find(sglang.__version__)
stock, modules = targets.resolve(target)
patch = hooks.Patch(target, modules, stock)
patch.apply(hooks.ADAPTERS[target.adapter](stock, Config()))
module, _, name = targets.ATTENTION_WRAPPER.rpartition(".")
wrapper = getattr(importlib.import_module(module), name)
setup = "sglang.srt.model_executor.model_runner_components.attention_backend_setup"
print(json.dumps({
    "release": sglang.__version__,
    "state": status.current().fields["state"],
    "hooks": {path: len(found) for path, found in HookRegistry._hooks.items()},
    "applied": targets.ATTENTION_WRAPPER in HookRegistry._patched,
    "wrapped": hasattr(wrapper, "__wrapped__"),
    "importer": getattr(importlib.import_module(setup), name) is wrapper,
    "live": patch.describe()[0]["live"],
}))
"""


def _probe(**settings: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_TRINV")}
    env |= {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore", **settings}
    return subprocess.run(
        [sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module", autouse=True)
def installed() -> str:
    """Release of the installed SGLang, beside which the plugin must be installed as well."""
    try:
        release = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("SGLang is not installed here")
    points = importlib.metadata.entry_points(group="sglang.srt.plugins", name="trinv")
    assert [point.value for point in points] == ["sglang_trinv.plugin:register"]
    return release


def test_plugin_is_found_hooked_and_the_target_replaced(installed: str) -> None:
    done = _probe()
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    ours = targets.ATTENTION_WRAPPER
    assert found["hooks"].pop(ours) == 1
    assert not [path for path in found["hooks"] if "chunk_fwd" in path]
    assert found | {"hooks": None} == {
        "release": installed, "state": "registered", "hooks": None, "applied": True,
        "wrapped": True, "importer": True, "live": True,
    }  # fmt: skip


def test_wrong_setting_stops_the_loader_with_one_line() -> None:
    done = _probe(SGLANG_TRINV_CHECK="many")
    assert done.returncode == 1
    wanted = "sglang_trinv: SGLANG_TRINV_CHECK: want a whole number, 0 or more; got 'many'"
    assert done.stderr.splitlines()[-1] == wanted
    assert "Traceback" not in done.stderr
