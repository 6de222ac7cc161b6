"""Each release's sources say what the table and the adapters assume, and the checks can say no."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from sglang_trinv import hooks, targets
from sglang_trinv.compat.checks import CHECKS, Differs, Release
from sglang_trinv.config import Config

FLA = "sglang/kernels/ops/attention/fla"
ATTENTION = "sglang/srt/layers/attention"
pytestmark = pytest.mark.filterwarnings("ignore:Triton is not supported on current platform")


@pytest.mark.parametrize("check", CHECKS)
def test_sources_are_as_the_table_says(
    check: str, release: str, sources: Path, target: targets.Target
) -> None:
    assert CHECKS[check](Release(release, sources, target))


def test_adapter_has_the_signature_of_what_it_replaces(
    installed_release: str, target: targets.Target
) -> None:
    stock, _ = targets.resolve(target)
    adapter = hooks.ADAPTERS[target.adapter](stock, Config())
    assert adapter.__module__ == stock.__module__  # functools.wraps: stock's identity
    del adapter.__wrapped__
    assert targets.parameters_of(adapter) == target.parameters


def test_the_table_names_every_release_once() -> None:
    assert len(set(targets.RELEASES)) == len(targets.RELEASES) == 19


# What could happen in a release to come: file of 0.5.23, text, its replacement, check, complaint
CHANGES = {
    "parameter": (
        f"{FLA}/chunk_fwd.py", "chunk_size: int = 64,", "chunk_size: int = 64, safe: bool = False,",
        "function", "chunk_size=64, safe=False, chunk_indices=None",
    ),
    "default": (
        f"{FLA}/chunk_fwd.py", "chunk_size: int = 64,", "chunk_size: int = 128,",
        "function", "chunk_size=128",
    ),
    "renamed": (
        f"{FLA}/chunk_fwd.py", "def chunk_gated_delta_rule_fwd_intra", "def gdn_intra",
        "function", "not there",
    ),
    "another importer": (
        f"{FLA}/cumsum.py", "import torch\n",
        "import torch\nfrom .chunk_fwd import chunk_gated_delta_rule_fwd_intra as f\n",
        "importers", f"{FLA}/cumsum.py: also uses",
    ),
    "imported from elsewhere": (
        f"{FLA}/chunk.py", "attention.fla.chunk_fwd import", "attention.fla.fused import",
        "importers", "does not import it from",
    ),
    "positional call": (
        f"{FLA}/chunk.py", "chunk_gated_delta_rule_fwd_intra(\n        k=k,",
        "chunk_gated_delta_rule_fwd_intra(\n        k,", "call_site", "called with",
    ),
    "third result used": (
        f"{FLA}/chunk.py", "    h, v_new = ", "    w = w + A.sum()\n    h, v_new = ",
        "call_site", "third result is used",
    ),
    "wrapper's parameters": (
        f"{ATTENTION}/attention_registry.py", "def attn_backend_wrapper(runner",
        "def attn_backend_wrapper(ctx, runner", "wrapper", "got (ctx, runner",
    ),
    "wrapper bound elsewhere": (
        "sglang/srt/model_executor/model_runner_components/attention_backend_setup.py",
        "attention.attention_registry import", "attention.registry import",
        "wrapper", "does not import attn_backend_wrapper by name",
    ),
    "loader that swallows": (
        "sglang/srt/plugins/__init__.py", "except Exception", "except BaseException",
        "entry", "catches BaseException",
    ),
    "scheduler without plugins": (
        "sglang/srt/managers/scheduler.py", "    load_plugins()", "    pass",
        "entry", "run_scheduler_process: want one call of load_plugins, got 0",
    ),
    "config moved": (
        "sglang/srt/configs/hybrid_arch.py", "def hybrid_gdn_config", "def gdn_config_of",
        "gdn_config", "hybrid_gdn_config is not defined where it was",
    ),
    "default renamed": (
        f"{ATTENTION}/linear/gdn_backend.py", "flashinfer_gdn_prefill_default", "gdn_default",
        "prefill", "default of the prefill",
    ),
    "kernel moved": (
        f"{ATTENTION}/linear/kernels/gdn_triton.py", "chunk_gated_delta_rule(", "prefill(",
        "prefill", "extend calls something else",
    ),
}  # fmt: skip


@pytest.fixture
def changed(all_sources: dict[str, Path], tmp_path: Path) -> Path:
    copy = tmp_path / "sources"
    shutil.copytree(all_sources["0.5.23"], copy)
    return copy


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_release_is_noticed(changed: Path, change: str) -> None:
    file, before, after, check, complaint = CHANGES[change]
    text = (changed / file).read_text()
    assert before in text
    (changed / file).write_text(text.replace(before, after))
    with pytest.raises(Differs) as error:
        CHECKS[check](Release("0.5.24", changed, targets.find("0.5.23")))
    assert complaint in str(error.value)


def test_a_missing_file_is_noticed(changed: Path) -> None:
    (changed / FLA / "chunk.py").unlink()
    with pytest.raises(Differs, match="chunk.py: No such file"):
        CHECKS["call_site"](Release("0.5.24", changed, targets.find("0.5.23")))


def test_rows_do_not_fit_each_other(all_sources: dict[str, Path]) -> None:
    """A row that fitted every release would say nothing about any."""
    for number, sources in all_sources.items():
        for target in targets.TARGETS:
            if number in target.releases:
                continue
            results = []
            for check in CHECKS.values():
                try:
                    results.append(bool(check(Release(number, sources, target))))
                except (Differs, targets.TargetMissing):
                    results.append(False)
            same = dataclasses.replace(target, releases=(), prefill_flag="context")
            own = targets.find(number)
            if same != dataclasses.replace(own, releases=(), prefill_flag="context"):
                assert not all(results), (number, target.releases)
