"""The table of releases: what is in it, what is refused, and how."""

from __future__ import annotations

import pytest

from sglang_trinv import targets
from sglang_trinv.errors import TargetMissing


@pytest.mark.parametrize("release", ["0.5.9", "0.5.11", "0.5.15.post1", "0.5.16", "0.5.20+cu130"])
def test_releases_of_the_table(release: str) -> None:
    assert release.split("+")[0] in targets.find(release).releases


@pytest.mark.parametrize(
    "release",
    [
        "0.5.8",
        "0.5.10.post2",
        "0.5.24",
        "0.6",
        "0.5.23.post1",
        "0.5.23rc1",
        "0.5.24.dev1+g1",
        "0.0.0.dev0",
    ],
)
def test_releases_outside(release: str) -> None:
    with pytest.raises(TargetMissing) as error:
        targets.find(release)
    assert str(error.value) == (
        f"SGLang {release} is not in the table of sglang_trinv; supported are 0.5.9 to 0.5.23"
    )


def test_no_release_at_all() -> None:
    with pytest.raises(TargetMissing, match="'main' is not a release number"):
        targets.find("main")


def test_only_releases_before_the_plugin_system_are_patched() -> None:
    assert targets.PATCHED == ("0.5.9", "0.5.10", "0.5.10.post1")


@pytest.mark.parametrize(
    ("release", "reason"),
    [
        ("0.5.9", "no chunk_kda_fwd_intra"),
        ("0.5.10", "gates in natural logarithms"),
        ("0.5.16", "right from 0.5.17 on"),
        ("0.5.17", None),
        ("0.5.23+cu130", None),
    ],
)
def test_kda_is_refused_where_sglangs_gates_are_in_the_wrong_base(
    release: str, reason: str | None
) -> None:
    refusal = targets.kda_refusal(release)
    assert refusal == "" if reason is None else reason in refusal and release in refusal
