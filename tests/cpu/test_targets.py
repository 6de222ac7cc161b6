"""The table of releases: what is in it, what is refused, and how."""

from __future__ import annotations

import pytest

from sglang_trinv import targets
from sglang_trinv.errors import TargetMissing


@pytest.mark.parametrize("release", ["0.5.11", "0.5.15.post1", "0.5.16", "0.5.20+cu130"])
def test_releases_of_the_table(release: str) -> None:
    assert release.split("+")[0] in targets.find(release).releases


@pytest.mark.parametrize(
    "release",
    ["0.5.10.post1", "0.5.24", "0.6", "0.5.23.post1", "0.5.23rc1", "0.5.24.dev1+g1", "0.0.0.dev0"],
)
def test_releases_outside(release: str) -> None:
    with pytest.raises(TargetMissing) as error:
        targets.find(release)
    assert str(error.value) == (
        f"SGLang {release} is not in the table of sglang_trinv; supported are 0.5.11 to 0.5.23"
    )


def test_no_release_at_all() -> None:
    with pytest.raises(TargetMissing, match="'main' is not a release number"):
        targets.find("main")
