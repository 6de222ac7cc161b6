"""Fixtures of the tests against real SGLang sources."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_trinv import targets
from tests.sglang import wheels


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.sglang)


@pytest.fixture(scope="session")
def all_sources() -> dict[str, Path]:
    """Folder with the sources of each release in the table."""
    return wheels.fetch(targets.RELEASES, wheels.cache_folder())


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
def parsed(sources: Path) -> Callable[[str], ast.Module]:
    """Parse a file of the release, named by its path or its dotted module."""

    def parse(name: str) -> ast.Module:
        path = name if name.endswith(".py") else name.replace(".", "/") + ".py"
        return ast.parse((sources / path).read_text())

    return parse


@pytest.fixture
def installed_release(
    release: str, sources: Path, sglang_from: Callable[..., object], process: object
) -> str:
    """The sources of ``release`` are what ``import sglang`` finds."""
    sglang_from(sources, release)
    return release
