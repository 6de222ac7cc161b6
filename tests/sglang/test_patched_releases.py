"""A patched SGLang without plugins: its own attention registry, imported, installs the kernels."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_trinv import install, selfcheck, status, targets
from sglang_trinv.patches import apply as patcher
from sglang_trinv.serve import config as serve_config
from tests.sglang.stage import GDN, LINEAR, Anything, Stage

pytestmark = pytest.mark.filterwarnings("ignore:Triton is not supported on current platform")
REGISTRY = "sglang.srt.layers.attention.attention_registry"


@pytest.fixture(params=targets.PATCHED)
def release(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def patched(
    release: str,
    sources: Path,
    tmp_path: Path,
    sglang_from: Callable[..., ModuleType],
    process: object,
    clean_env: pytest.MonkeyPatch,
) -> Iterator[Callable[[], ModuleType]]:
    """Import the attention registry of the patched release; what needs a server is made up."""
    site = patcher.find_site(Path(shutil.copytree(sources, tmp_path / "site")))
    patcher.apply(site, patcher.find_patch(site))
    sglang_from(site.path, release)
    finder = Anything()
    sys.meta_path.append(finder)
    clean_env.setenv("TRITON_INTERPRET", "1")
    clean_env.setattr(install, "_installer", install.Installer())

    def load() -> ModuleType:
        _make_up_backends()
        return importlib.import_module(REGISTRY)

    yield load
    sys.meta_path.remove(finder)


def _make_up_backends() -> None:
    no = dict.fromkeys(("is_blackwell", "is_npu", "is_sm120_supported"), bool)
    Stage._fill("sglang.srt.utils", **no)
    kernel = type("TritonGDNKernel", (), {})()

    class GDNAttnBackend:
        def __init__(self, runner: Any) -> None:
            self.kernel_dispatcher = SimpleNamespace(extend_kernel=kernel)

    class HybridLinearAttnBackend:
        def __init__(self, full: Any, linear: Any, layers: list[int]) -> None:
            self.linear_attn_backend = linear

    Stage._fill(
        "sglang.srt.layers.attention.hybrid_linear_attn_backend",
        HybridLinearAttnBackend=HybridLinearAttnBackend,
        GDNAttnBackend=GDNAttnBackend,
    )
    Stage._fill(f"{LINEAR}.gdn_backend", GDNAttnBackend=GDNAttnBackend)
    Stage._fill(f"{LINEAR}.utils", initialize_linear_attn_config=lambda args: None)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    # The check runs SGLang's kernel too, which needs the CPU platform here: see the e2e tests.
    monkeypatch.setattr(selfcheck, "run", lambda *_: {"worst_ratio": 0.5})
    state = torch.zeros(3, 2, 4, 128, 128).bfloat16()
    nothing = dict.fromkeys(("mamba2_config", "kimi_linear_config", "hybrid_lightning_config"))
    pool = SimpleNamespace(mamba_pool=SimpleNamespace(mamba_cache=SimpleNamespace(temporal=state)))
    return SimpleNamespace(
        **nothing,
        device="cpu",
        hybrid_gdn_config=GDN,
        mambaish_config=GDN,
        is_draft_worker=False,
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        req_to_token_pool=pool,
        server_args=SimpleNamespace(attention_backend="triton"),
        use_mla_backend=False,
    )


def test_building_the_backend_installs_the_kernels(
    patched: Callable[[], ModuleType], runner: SimpleNamespace, release: str
) -> None:
    registry = patched()
    fields = status.current().fields
    assert fields["state"] == "registered"
    assert fields["release"] == release
    backend = registry.attn_backend_wrapper(runner, "full attention")
    assert type(backend).__name__ == "HybridLinearAttnBackend"
    assert fields["state"] == "installed", fields["reason"]
    assert fields["prefill_backend"] == "triton"
    assert fields["on_hot_path"] is True
    target = targets.find(release)
    (hook,) = status.current().to_dict()["hooks"]
    assert hook["target"] == target.dotted
    assert hook["live"] is True
    chunk = importlib.import_module(f"{target.fla}.chunk")
    assert getattr(chunk, target.function).__wrapped__
    install._installer.patch.undo()


@pytest.mark.parametrize("release", ["0.5.9"])
def test_kda_keeps_its_own_inverse(
    patched: Callable[[], ModuleType], runner: SimpleNamespace, release: str
) -> None:
    patched().attn_backend_wrapper(runner, "full attention")
    fla = targets.find(release).fla
    defining = importlib.import_module(f"{fla}.solve_tril")
    kda = importlib.import_module(f"{fla}.kda")  # imported after us, as in the server
    assert kda.solve_tril is defining.solve_tril
    assert not hasattr(defining.solve_tril, "_sglang_trinv")
    install._installer.patch.undo()


def test_switched_off_the_wrapper_is_sglangs(
    patched: Callable[[], ModuleType], clean_env: pytest.MonkeyPatch
) -> None:
    clean_env.setenv("SGLANG_TRINV", "0")
    wrapper = patched().attn_backend_wrapper
    assert not hasattr(wrapper, "__wrapped__")
    assert wrapper.__module__ == REGISTRY
    assert status.current().fields["state"] == "off"


def test_a_wrong_setting_ends_the_process(
    patched: Callable[[], ModuleType], clean_env: pytest.MonkeyPatch
) -> None:
    clean_env.setenv("SGLANG_TRINV_METHOD", "fastest")
    with pytest.raises(SystemExit, match="^sglang_trinv: SGLANG_TRINV_METHOD: "):
        patched()


def test_serve_wants_the_patch(
    release: str, sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site = patcher.find_site(Path(shutil.copytree(sources, tmp_path / "site")))
    monkeypatch.setattr(serve_config.importlib.metadata, "version", lambda name: release)
    monkeypatch.setattr(patcher, "find_site", lambda: site)
    assert serve_config.check_release("stock") == release
    with pytest.raises(patcher.PatchError, match=r"is not applied: run `sglang-trinv patch"):
        serve_config.check_release()
    patcher.apply(site, patcher.find_patch(site))
    assert serve_config.check_release() == release
