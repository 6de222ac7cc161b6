"""Shared fixtures, and the choice of Triton's interpreter where there is no GPU.

It must be made before Triton decorates the first kernel: so here, above every import of ours.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

GATES_VARIABLE = "SGLANG_TRINV_GATES"  # names a data folder for tests; no setting of the package


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the caller's SGLANG_TRINV* variables."""
    for name in list(os.environ):
        if name.startswith("SGLANG_TRINV") and name != GATES_VARIABLE:
            monkeypatch.delenv(name)


@pytest.fixture
def clean_env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which ``Config.from_env()`` finds nothing: also without the data folder."""
    monkeypatch.delenv(GATES_VARIABLE, raising=False)
    return monkeypatch


@pytest.fixture
def process() -> Iterator[object]:
    """A fresh process status that writes no file."""
    from sglang_trinv import status

    yield status.reset()
    status.reset()


@pytest.fixture
def forget_sglang() -> Iterator[None]:
    """Whatever a test imports or puts under the name ``sglang`` is gone after it."""
    before = {name: module for name, module in sys.modules.items() if _is_sglang(name)}
    yield
    for name in [name for name in sys.modules if _is_sglang(name)]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def sglang_from(forget_sglang: None) -> Callable[[Path, str], types.ModuleType]:
    """Put the unpacked sources of one SGLang release under the name ``sglang``."""
    from sglang_trinv.compat import chain

    def load(folder: Path, release: str) -> types.ModuleType:
        for name in [name for name in sys.modules if _is_sglang(name)]:
            del sys.modules[name]
        return chain.import_sglang_from(folder, release)

    return load


def _is_sglang(name: str) -> bool:
    return name == "sglang" or name.startswith("sglang.")
