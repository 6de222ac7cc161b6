"""FlashInfer or Triton, with and without SGLANG_TRINV_FORCE, by each release's own code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_trinv import targets
from tests.sglang.conftest import FUSED
from tests.sglang.stage import Anything, Stage

MakeStage = Callable[..., Stage]
pytestmark = pytest.mark.filterwarnings("ignore:Triton is not supported on current platform")


@pytest.fixture(params=FUSED)
def release(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def stage(installed_release: str, sources: Path, target: targets.Target) -> Iterator[MakeStage]:
    finder = Anything()
    sys.meta_path.append(finder)
    yield lambda **flags: Stage(sources, target, **flags)
    sys.meta_path.remove(finder)


def test_without_force_sglang_decides(stage: MakeStage, target: targets.Target) -> None:
    expected = "flashinfer" if target.prefill_default else "triton"
    assert targets.prefill_backend_of(target, stage().build()) == expected


@pytest.mark.parametrize("flag", ["triton", "flashinfer"])
def test_without_force_the_users_flag_decides(
    stage: MakeStage, target: targets.Target, flag: str
) -> None:
    backend = stage(linear_attn_prefill_backend=flag).build()
    assert targets.prefill_backend_of(target, backend) == flag


@pytest.mark.parametrize("release", ["0.5.16", "0.5.17", "0.5.20", "0.5.23"])
def test_other_kernels_are_named(stage: MakeStage, target: targets.Target) -> None:
    backend = stage(linear_attn_prefill_backend="cutedsl").build()
    assert targets.prefill_backend_of(target, backend) == "cutedsl"


def test_force_displaces_sglangs_own_choice(stage: MakeStage, target: targets.Target) -> None:
    built = stage()
    assert targets.force_triton_prefill(target, built.runner) is bool(target.prefill_default)
    assert targets.prefill_backend_of(target, built.build()) == "triton"
    assert not [line for line in built.log if "FlashInfer" in line]  # nor does SGLang say so


@pytest.mark.parametrize(
    "flags",
    [
        {"linear_attn_prefill_backend": "flashinfer"},
        {"linear_attn_backend": "flashinfer"},
        {"linear_attn_prefill_backend": "flashinfer", "linear_attn_decode_backend": "flashinfer"},
    ],
)
def test_force_displaces_an_explicit_flag(
    stage: MakeStage, target: targets.Target, flags: dict[str, str]
) -> None:
    built = stage(**flags)
    assert targets.force_triton_prefill(target, built.runner) is True
    backend = built.build()
    assert targets.prefill_backend_of(target, backend) == "triton"
    decode = backend.linear_attn_backend.kernel_dispatcher.decode_kernel
    wants_flashinfer = "flashinfer" in (
        flags.get("linear_attn_decode_backend"), flags.get("linear_attn_backend")
    )  # fmt: skip
    assert (type(decode).__name__ == "FlashInferGDNKernel") is wants_flashinfer
    assert targets.force_triton_prefill(target, built.runner) is False  # once is enough


@pytest.mark.parametrize(
    "flags", [{"linear_attn_prefill_backend": "triton"}, {"linear_attn_backend": "cutedsl"}]
)
def test_force_leaves_every_other_choice_alone(
    stage: MakeStage, target: targets.Target, flags: dict[str, str]
) -> None:
    built = stage(**flags)
    assert targets.force_triton_prefill(target, built.runner) is False


def test_sglang_is_asked_for_its_own_choice(stage: MakeStage, target: targets.Target) -> None:
    answers = target.prefill_default == "flashinfer_gdn_prefill_default"
    for flags, expected in (
        ({}, answers),
        ({"linear_attn_prefill_backend": "triton"}, False),
        ({"linear_attn_prefill_backend": "flashinfer"}, False),
    ):
        assert targets.defaults_to_flashinfer(target, stage(**flags).runner) is expected


def test_a_backend_without_gdn_kernels_is_unknown(target: targets.Target) -> None:
    assert targets.prefill_backend_of(target, "full attention") == "unknown"
