"""KDA in a process that only looks like SGLang's scheduler: installed, idle, refused, counted."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_trinv import check, dispatch, hooks, install_kda, selfcheck, targets_kda
from sglang_trinv.config import Config
from sglang_trinv.errors import TargetMissing, UnsupportedCall
from sglang_trinv.reference.kda import naive_kda_intra
from sglang_trinv.status import ProcessStatus
from tests.kda_checks import RANDOM, kda_inputs

TARGET = targets_kda.find("0.5.20")
ON = {"kda": "intra"}


def stock(
    q, k, v, gk=None, beta=None, scale=None, cu_seqlens=None, chunk_size=64, chunk_indices=None,
    safe_gate=False, fuse_recompute=False, fuse_diagonal=False,
):  # fmt: skip
    return ("stock",)


def runner(**changes: Any) -> SimpleNamespace:
    """A runner of Kimi-Linear's 20 KDA layers on one rank of four."""
    state = torch.empty(20, 2, 8, 16, 16, device="meta")
    return SimpleNamespace(
        **{
            "device": "cpu",
            "model_config": SimpleNamespace(dtype=torch.bfloat16),
            "req_to_token_pool": SimpleNamespace(
                mamba_pool=SimpleNamespace(mamba_cache=SimpleNamespace(temporal=state))
            ),
            **changes,
        }
    )


def backend(kernel: str = "TritonKDAKernel", linear: str = "KDAAttnBackend") -> SimpleNamespace:
    made = type(linear, (), {})()
    made.kernel_dispatcher = SimpleNamespace(extend_kernel=type(kernel, (), {})())
    return SimpleNamespace(linear_attn_backend=made)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Options of each call of the op, which answers at once."""
    options: list[dict[str, Any]] = []

    def op(q, k, v, *_: Any, **found: Any) -> tuple[Any, ...]:
        options.append(found)
        return k, v, None, k, k, None

    monkeypatch.setattr(dispatch.ops, "chunk_kda_fwd_intra", op)
    monkeypatch.setattr(selfcheck, "run", lambda *_: {"worst_ratio": 0.5})
    return options


@pytest.fixture
def modules(
    forget_sglang: None, monkeypatch: pytest.MonkeyPatch, seen: list[Any]
) -> list[ModuleType]:
    """The two modules that hold the function, under SGLang's names."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    names = list(TARGET.holders)
    packages = {name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1)}
    for name in sorted({*packages, *names}):
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    found = [sys.modules[name] for name in names]
    sys.modules["sglang"].__version__ = "0.5.20"
    for module in found:
        module.chunk_kda_fwd_intra = stock
    return found


def test_installs_once_and_says_so(
    modules: list[ModuleType], process: ProcessStatus, caplog: pytest.LogCaptureFixture
) -> None:
    installer = install_kda.KdaInstaller()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert installer.install_for(runner(), backend(), Config(**ON)) == "installed"
    first, second = (module.chunk_kda_fwd_intra for module in modules)
    assert first is second is not stock
    assert first.__wrapped__ is stock
    assert caplog.messages == [
        "sglang_trinv 0.1.0: KDA intra-chunk step replaced (method auto, K16 V16, Hk8/Hv8); "
        "prefill backend triton"
    ]
    fields = process.to_dict()
    assert fields["state"] == "installed"
    assert fields["layers"] == {"gdn": None, "kda": 20}
    assert fields["on_hot_path"] is True
    assert fields["hooks"] == [
        {"target": TARGET.dotted, "importers": [TARGET.holders[1]], "live": True}
    ]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, backend()),
        ({"kda": "auto"}, backend()),
        (ON, backend("TritonGDNKernel", "GDNAttnBackend")),
        (ON, "full attention"),
    ],
)
def test_nothing_is_touched(
    modules: list[ModuleType], process: ProcessStatus, settings: dict[str, str], found: Any
) -> None:
    before = process.fields["state"]
    installer = install_kda.KdaInstaller()
    assert installer.install_for(runner(), found, Config(**settings)) == "registered"
    assert all(module.chunk_kda_fwd_intra is stock for module in modules)
    assert process.fields["state"] == before


@pytest.mark.parametrize(
    ("device", "capability", "K", "dtype", "faster"),
    [
        ("cuda", (9, 0), 128, torch.bfloat16, True),
        ("cuda", (9, 0), 64, torch.bfloat16, False),
        ("cuda", (9, 0), 128, torch.float16, False),
        ("cuda", (8, 0), 128, torch.bfloat16, False),
        ("cpu", (9, 0), 128, torch.bfloat16, False),
    ],
)
def test_auto_takes_over_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: tuple[int, int], K: int,
    dtype: torch.dtype, faster: bool,
) -> None:  # fmt: skip
    from sglang_trinv.ops import launch

    monkeypatch.setattr(launch, "capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = runner(device=device, model_config=SimpleNamespace(dtype=dtype))
    pool = found.req_to_token_pool.mamba_pool
    pool.mamba_cache.temporal = torch.empty(20, 2, 8, K, K, device="meta")
    assert install_kda.faster_here(found, "auto") == faster


def test_another_prefill_backend_is_a_warning(
    modules: list[ModuleType], process: ProcessStatus, caplog: pytest.LogCaptureFixture
) -> None:
    install_kda.KdaInstaller().install_for(runner(), backend("FlashKDAKernel"), Config(**ON))
    (message,) = caplog.messages
    assert "not on the hot path: SGLang's KDA prefill backend is flash; use --linear" in message
    assert process.fields["on_hot_path"] is False


@pytest.mark.parametrize("release", ["0.5.16", "0.5.11", "0.5.9"])
def test_releases_with_gates_of_the_wrong_base_are_refused(
    modules: list[ModuleType], process: ProcessStatus, release: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    sys.modules["sglang"].__version__ = release
    assert install_kda.KdaInstaller().install_for(runner(), backend(), Config(**ON)) == "refused"
    assert "KDA is refused: SGLang" in caplog.text
    assert all(module.chunk_kda_fwd_intra is stock for module in modules)
    with pytest.raises(SystemExit, match="SGLANG_TRINV_STRICT=1"):
        install_kda.KdaInstaller().install_for(runner(), backend(), Config(**ON, strict=True))


def test_unknown_releases_are_refused() -> None:
    for release in ("0.5.24", "0.6.0"):
        with pytest.raises(TargetMissing, match=release):
            targets_kda.find(release)
    assert targets_kda.find("0.5.23+cu130") is TARGET


def test_calls_are_answered_counted_and_fall_back(
    process: ProcessStatus, seen: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = hooks.kda_intra_adapter(stock, Config())
    x = torch.zeros(1, 4, 1, 16).bfloat16()
    w, u, none, kg, Aqk, Akk = adapter(x, x, x, fuse_recompute=True)
    assert none is Akk is None
    assert seen == [{"method": "auto", "return_A": False}]
    assert sum(process.calls["kda_intra"].values()) == 1

    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedCall("k: want something else")

    monkeypatch.setattr(dispatch.ops, "chunk_kda_fwd_intra", refuse)
    assert adapter(x, x, x) == ("stock",)
    assert process.fallbacks == {"k: want something else": 1}
    with pytest.raises(UnsupportedCall):
        hooks.kda_intra_adapter(stock, Config(strict=True))(x, x, x)


def test_the_check_finds_a_wrong_result() -> None:
    x = kda_inputs(RANDOM, 100, lengths=[70, 30])
    call = (x.q, x.k, x.v, x.gk, x.beta, 0.25, x.cu_seqlens, 64, None, False, True, True)
    w, u, kg, Aqk, _ = (t.to(x.k.dtype) for t in naive_kda_intra(*call[:7]))
    stock = (w, u, None, kg, Aqk, None)
    assert all(c.agrees and c.to_stock == 0 for c in check.compare_kda_intra(call, stock, stock))
    wrong = (w, u, None, kg * 1.02, Aqk, None)
    found = check.compare_kda_intra(call, wrong, stock)
    assert [(c.name, c.agrees) for c in found] == [("w", True), ("u", True), ("kg", False)]
