"""The whole prefill in SGLang's place, by each release's own dispatcher, caller and kernel."""

from __future__ import annotations

import ast
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_trinv import install_full, ops, prefill, status, targets, targets_full
from sglang_trinv.config import Config
from sglang_trinv.errors import UnsupportedCall
from sglang_trinv.selfcheck import SelfCheckFailed
from tests.sglang.stage import GDN, LINEAR, Anything, Stage, extract
from tests.sglang.test_installer import _hf_config

pytestmark = pytest.mark.filterwarnings("ignore:Triton is not supported on current platform")
# 0.5.18 brings state checkpoints, 0.5.20 inplace_update, 0.5.22 snapshots of tracked states.
RELEASES = ("0.5.16", "0.5.20", "0.5.23")
FULL = Config(gdn="full")
GDN_TRITON = "sglang/srt/layers/attention/linear/kernels/gdn_triton.py"
TENSORS = tuple(torch.zeros(1, 70, 4, 128) for _ in range(3))
GATES = (torch.zeros(1, 70, 4), torch.zeros(1, 70, 4))


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches the op, which answers at once."""
    seen = []

    def op(*tensors: torch.Tensor, **options: Any) -> tuple[Any, ...]:
        seen.append(options)
        return tensors[2], None, "h" if options["return_h"] else None

    monkeypatch.setattr(ops, "chunk_gated_delta_rule", op)
    monkeypatch.setattr(install_full, "_installer", install_full.FullInstaller())
    monkeypatch.setattr(install_full.selfcheck, "run", lambda *_: {"worst_ratio": 0.5})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return seen


@pytest.fixture
def stage(
    installed_release: str, sources: Path, target: targets.Target, calls: list[Any]
) -> Iterator[Callable[..., Stage]]:
    """The release's wrapper, dispatcher and TritonGDNKernel; its chain only answers "stock"."""
    finder = Anything()
    sys.meta_path.append(finder)

    def make(**flags: Any) -> Stage:
        made = Stage(sources, target, **flags)
        made.runner.device = "cpu"
        made.runner.model_config.dtype = torch.bfloat16
        made.runner.model_config.hf_config = _hf_config(target)
        h = torch.arange(4.0).view(1, 4, 1, 1, 1).expand(1, 4, 4, 128, 128)
        scope: dict[str, Any] = {
            "is_npu": bool, "is_cpu": bool, "torch": torch,
            "chunk_gated_delta_rule": lambda **_: ("stock", None, h),
        }  # fmt: skip
        extract(sources, GDN_TRITON, ("TritonGDNKernel: extend",), scope)
        kernel = scope["TritonGDNKernel"]
        chain = scope["chunk_gated_delta_rule"]
        made._fill(targets_full.GDN_TRITON, TritonGDNKernel=kernel, chunk_gated_delta_rule=chain)
        sys.modules[f"{LINEAR}.gdn_backend"].GDNKernelDispatcher.__init__.__globals__[
            "TritonGDNKernel"
        ] = kernel
        return made

    yield make
    sys.meta_path.remove(finder)


def extend(backend: Any, **options: Any) -> Any:
    """A call as ``forward_extend`` makes it, through the release's own dispatcher."""
    q, k, v = TENSORS
    return backend.linear_attn_backend.kernel_dispatcher.extend(
        q=q, k=k, v=v, g=GATES[0], beta=GATES[1],
        ssm_states=torch.zeros(3, 4, 128, 128), cache_indices=torch.tensor([2, 0]).int(),
        query_start_loc=torch.tensor([0, 65, 70]).int(), **options,
    )  # fmt: skip


def installed(stage: Callable[..., Stage], config: Config = FULL, **flags: Any) -> Any:
    made = stage(**{"linear_attn_prefill_backend": "triton", **flags})
    backend = made.build()
    install_full.install_once(made.runner, backend, config)
    return backend


def test_ours_answers_what_the_dispatcher_is_asked(
    stage: Callable[..., Stage], calls: list[Any], process: status.ProcessStatus
) -> None:
    backend = installed(stage)
    assert process.fields["on_hot_path"]
    assert process.hooks()[-1]["live"]
    del calls[:]  # of the warm-up
    o, last, h = extend(backend, layer_id=3, output=None, state_checkpoint_cu_starts=None)
    assert (o is TENSORS[2], last, h) == (True, None, "h")
    (call,) = calls
    assert call["use_qk_l2norm_in_kernel"]
    assert call["inplace_update"]
    assert not call["batch_invariant"]
    assert call["cu_seqlens"].tolist() == [0, 65, 70]
    assert call["initial_state_indices"].tolist() == [2, 0]
    assert process.calls[prefill.OP]["triton-interpreter"] == 1
    dispatcher = backend.linear_attn_backend.kernel_dispatcher
    assert type(dispatcher.verify_kernel).__name__ == "TritonGDNKernel"
    assert type(dispatcher.decode_kernel).__name__ == "TritonGDNKernel"
    assert not getattr(dispatcher, "extend_uses_state_checkpoints", False)


def test_states_before_chunks_are_made_only_where_they_are_read(
    stage: Callable[..., Stage], calls: list[Any]
) -> None:
    backend = installed(stage)
    linear, track = backend.linear_attn_backend, torch.zeros(2, 4, 128, 128)
    chunks = torch.tensor([0, -1])
    for tracks, options in (
        (False, {}), (True, {}), (True, {"track_state": track, "track_chunk_idx": chunks}),
    ):  # fmt: skip
        linear.forward_metadata = SimpleNamespace(has_mamba_track_mask=tracks)
        extend(backend, **options)
    assert [call["return_h"] for call in calls[-3:]] == [False, True, False]
    assert calls[-1]["track_state"] is track
    assert calls[-1]["track_chunk_idx"] is chunks
    extend(backend, inplace_update=False)
    assert not calls[-1]["inplace_update"]


def test_a_refused_call_goes_to_sglangs_chain(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, process: status.ProcessStatus
) -> None:
    backend = installed(stage)

    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedCall("q: want that, got this")

    monkeypatch.setattr(ops, "chunk_gated_delta_rule", refuse)
    track = torch.full((2, 4, 128, 128), 9.0)
    # Sequences of 65 and 5 tokens: their chunks are 0, 1 and 2 in h.
    result = extend(backend, track_state=track, track_chunk_idx=torch.tensor([1, -1]))
    assert result[0] == "stock"
    assert (track[0] == 1).all()
    assert (track[1] == 9).all()
    assert process.fallbacks["q: want that, got this"] == 1
    strict = installed(stage, Config(gdn="full", strict=True))
    with pytest.raises(UnsupportedCall, match="q: want that"):
        extend(strict)


def test_auto_takes_over_only_what_was_measured(
    stage: Callable[..., Stage], monkeypatch: Any, calls: list[Any], process: status.ProcessStatus
) -> None:
    backend = installed(stage, Config())  # a CPU is not in the table
    assert extend(backend)[0] == "stock"
    kernel = backend.linear_attn_backend.kernel_dispatcher.extend_kernel
    assert type(kernel).__name__ == "TritonGDNKernel"

    win = prefill.Win((9, 0), "triton", ((16, 32),), 1024, ("a.json",))
    monkeypatch.setattr(prefill, "WINS", (win,))
    assert prefill.wins((9, 0), "triton", (16, 32), 1024)
    assert not prefill.wins((9, 0), "triton", (16, 32), 1023)
    assert not prefill.wins((9, 0), "flashinfer", (16, 32))
    assert not prefill.wins((10, 0), "triton", (16, 32))
    hopper = SimpleNamespace(Hg=16, H=32, device="cuda:0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(install_full.dispatch, "capability_of", lambda _: (9, 0))
    assert install_full._measured_faster("triton", hopper)
    assert not install_full._measured_faster("flashinfer", hopper)
    assert not install_full._measured_faster("triton", SimpleNamespace(**vars(hopper) | {"H": 64}))


def test_a_kernel_that_is_too_far_from_the_truth_is_not_installed(
    stage: Callable[..., Stage], monkeypatch: Any, calls: list[Any], process: status.ProcessStatus
) -> None:
    def fail(*_: Any) -> None:
        raise SelfCheckFailed("self-check: error of o is 1, allowed is 0.01")

    monkeypatch.setattr(install_full.selfcheck, "run", fail)
    backend = installed(stage)
    kernel = backend.linear_attn_backend.kernel_dispatcher.extend_kernel
    assert type(kernel).__name__ == "TritonGDNKernel"
    (reason,) = process.fallbacks
    assert "self-check: error of o" in reason
    made = stage(linear_attn_prefill_backend="triton")
    backend, strict = made.build(), Config(gdn="full", strict=True)
    with pytest.raises(SystemExit, match="self-check: error of o"):
        install_full.FullInstaller().install_for(made.runner, backend, strict)


@pytest.mark.parametrize("chosen", ["flashinfer", "cutedsl"])
def test_other_kernels_are_not_displaced(
    stage: Callable[..., Stage], chosen: str, process: status.ProcessStatus
) -> None:
    backend = installed(stage, linear_attn_prefill_backend=chosen)
    kernel = backend.linear_attn_backend.kernel_dispatcher.extend_kernel
    assert type(kernel).__name__.lower().startswith(chosen)
    (reason,) = process.fallbacks
    assert chosen in reason
    made, strict = stage(linear_attn_prefill_backend=chosen), Config(gdn="full", strict=True)
    backend = made.build()
    with pytest.raises(SystemExit, match=chosen):
        install_full.FullInstaller().install_for(made.runner, backend, strict)


@pytest.fixture
def faster_than_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(stocks: str, *_: Any, tokens: int | None = None) -> bool:
        return stocks == "flashinfer"

    monkeypatch.setattr(install_full, "_measured_faster", measured)


def displaced(made: Stage, config: Config) -> Any:
    """The backend as the plugin's hook has it built."""
    install_full.displace(made.runner, config)
    backend = made.build()
    install_full.install_once(made.runner, backend, config)
    return backend.linear_attn_backend.kernel_dispatcher


@pytest.mark.parametrize("config", [Config(), FULL])
@pytest.mark.parametrize("release", ["0.5.20", "0.5.23"])
def test_sglangs_own_flashinfer_is_displaced_where_ours_is_faster(
    stage: Callable[..., Stage], faster_than_flashinfer: None, config: Config, calls: list[Any],
    process: status.ProcessStatus,
) -> None:  # fmt: skip
    dispatcher = displaced(stage(), config)
    kernel = dispatcher.extend_kernel
    assert type(kernel).__name__ == "TrinvGDNKernel"
    assert kernel.instead_of == "flashinfer"
    assert process.fallbacks == {}
    assert process.hooks()[-1]["live"]
    assert not getattr(dispatcher, "extend_uses_state_checkpoints", False)


@pytest.mark.parametrize("release", ["0.5.20", "0.5.23"])
def test_flashinfer_stays_where_ours_is_too_far_from_the_truth(
    stage: Callable[..., Stage], faster_than_flashinfer: None, monkeypatch: Any, calls: list[Any],
    process: status.ProcessStatus,
) -> None:  # fmt: skip
    def fail(*_: Any) -> None:
        raise SelfCheckFailed("self-check: error of o is 1, allowed is 0.01")

    monkeypatch.setattr(install_full.selfcheck, "run", fail)
    dispatcher = displaced(stage(), Config())
    assert type(dispatcher.extend_kernel).__name__ == "FlashInferGDNKernel"
    (reason,) = process.fallbacks
    assert "self-check: error of o" in reason


@pytest.mark.parametrize("release", ["0.5.16", "0.5.20", "0.5.23"])
def test_a_users_flashinfer_is_never_displaced_by_the_table(
    stage: Callable[..., Stage], faster_than_flashinfer: None, calls: list[Any]
) -> None:
    dispatcher = displaced(stage(linear_attn_prefill_backend="flashinfer"), Config())
    assert type(dispatcher.extend_kernel).__name__ == "FlashInferGDNKernel"


def test_the_callers_arguments_are_known(
    release: str, sources: Path, target: targets.Target
) -> None:
    root = sources / "sglang/srt/layers/attention/linear"
    tree = ast.parse((root / "gdn_backend.py").read_text())
    asked = {
        keyword.arg
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "self.kernel_dispatcher.extend"
        for keyword in call.keywords
    }
    assert {"q", "k", "v", "g", "beta", "ssm_states", "cache_indices", "query_start_loc"} <= asked
    # What reaches **kwargs: used by us, or of no use to a kernel without checkpoints.
    used = {"inplace_update", "track_state", "track_chunk_idx"}
    unused = {
        "state_checkpoint_cu_starts", "num_state_checkpoints", "state_checkpoint_every_n_tokens",
        "output", "layer_id", "extend_prefix_lens",
    }  # fmt: skip
    named = {"q", "k", "v", "g", "beta", "ssm_states", "cache_indices", "query_start_loc"}
    assert asked - named <= used | unused


def test_the_log_names_the_shape(stage: Callable[..., Stage], caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    installed(stage)
    assert f"Hk2/Hv{GDN.linear_num_value_heads // 8}" in caplog.text
    assert "whole GDN prefill replaced" in caplog.text
