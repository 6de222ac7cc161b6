"""Fixtures of the tests against real SGLang sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from sglang_trinv import targets
from sglang_trinv.compat import sources as wheel_sources
from tests.sglang import wheels

# The releases that have the fused function: all but the oldest, which calls solve_tril.
FUSED = tuple(r for r in targets.RELEASES if targets.find(r).adapter == "fwd_intra")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.sglang)


@pytest.fixture(scope="session")
def all_sources() -> dict[str, Path]:
    """Folder with the sources of each release in the table."""
    cache = wheels.cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"):  # one of the processes of a parallel run downloads
        return wheel_sources.fetch(targets.RELEASES, cache)


@pytest.fixture(params=targets.RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def target(release: str) -> targets.Target:
    return targets.find(release)


@pytest.fixture
def sources(release: str, all_sources: dict[str, Path]) -> Path:
    return all_sources[release]


@pytest.fixture
def installed_release(
    release: str, sources: Path, sglang_from: Callable[..., object], process: object
) -> str:
    """The sources of ``release`` are what ``import sglang`` finds."""
    sglang_from(sources, release)
    return release
