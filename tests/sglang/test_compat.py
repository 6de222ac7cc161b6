"""The command that holds releases against the table, and SGLang's chain on our op."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_trinv import cli, targets
from sglang_trinv.compat import report as reports
from sglang_trinv.compat import sources as wheel_sources
from tests.sglang.wheels import cache_folder

OLDEST, MIDDLE, NEWEST = "0.5.9", "0.5.16", "0.5.23"


def compat(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and error."""
    command = ["compat", "--cache", str(cache_folder()), *arguments]
    result = CliRunner().invoke(cli.app, command)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("release", [OLDEST, MIDDLE, NEWEST])
def test_sglangs_own_chain_with_our_op(release: str, sources: Path, target: targets.Target) -> None:
    """The whole prefill, three sequences, near-equal keys: as close to float64 as with stock."""
    chain = reports.run_chain(release, sources, target)
    assert chain["ok"], chain
    assert chain["calls"] == {"triton-interpreter": 1}
    for name in ("o", "state"):
        assert 0 < chain[name]["ours"] <= chain[name]["allowed"] < 0.02


@pytest.mark.parametrize("release", [OLDEST, NEWEST])
def test_the_chain_sees_a_wrong_op(release: str, sources: Path, target: targets.Target) -> None:
    chain = reports.run_chain(release, sources, target, fault="zero_u")
    assert not chain["ok"]
    assert chain["o"]["ours"] > 0.9


def test_a_release_of_the_table() -> None:
    code, out, _ = compat("--release", MIDDLE, "--release", NEWEST, "--no-chain", "--json")
    assert code == 0
    found = json.loads(out)
    assert [(r["release"], r["ok"], r["in_table"], r["chain"]) for r in found] == [
        (MIDDLE, True, True, None),
        (NEWEST, True, True, None),
    ]


@pytest.fixture
def next_release(all_sources: dict[str, Path], tmp_path: Path) -> Path:
    """The newest release under the number of one that is not out yet, as a clone holds it."""
    folder = Path(shutil.copytree(all_sources[NEWEST], tmp_path / "python"))
    (folder / "sglang/version.py").write_text('__version__ = "0.5.99"\n')
    return folder


def test_a_release_that_is_not_out_yet(next_release: Path) -> None:
    code, out, _ = compat("--release", str(next_release))
    assert code == 0
    assert out.startswith(
        f"SGLang 0.5.99: fits the row of {NEWEST} in sglang_trinv/targets.py, where it can be added"
    )
    assert "error of o " in out


def test_a_release_that_changes_the_signature(next_release: Path) -> None:
    path = next_release / "sglang/kernels/ops/attention/fla/chunk_fwd.py"
    path.write_text(path.read_text().replace("chunk_size: int = 64,", "chunk_size: int = 128,"))
    code, out, _ = compat("--release", str(next_release))
    assert code == 1
    first, second = out.splitlines()
    assert first == f"SGLang 0.5.99: not as the table says for {NEWEST}"
    assert second.startswith("  function: signature of ")
    assert "chunk_size=128" in second


@pytest.mark.parametrize(
    ("release", "message"),
    [
        (
            "main",
            "error: --release: want a release number or a folder that holds sglang, got 'main'",
        ),
        ("0.5.99", "error: SGLang 0.5.99 was not downloaded: No matching distribution found for "),
        ("tests", "error: --release: no sglang/srt in the folder tests"),
    ],
)
def test_what_is_no_release(release: str, message: str) -> None:
    code, out, err = compat("--release", release)
    assert (code, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("0.5.23, 0.5.9, 0.5.8", []),
        ("0.5.24, 0.5.23, 0.5.9", ["0.5.24"]),
        ("0.6.0rc1, 0.5.24.post1, 0.5.10rc0, 0.4.9", ["0.5.24.post1", "0.6.0rc1"]),
        ("0.5.20.post1", ["0.5.20.post1"]),
    ],
)
def test_releases_that_the_table_lacks(
    monkeypatch: pytest.MonkeyPatch, listed: str, expected: list[str]
) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "pip"]
        out = f"sglang (0.5.23)\nAvailable versions: {listed}\n  LATEST: 0.5.23\n"
        return subprocess.CompletedProcess(command, 0, out, "")

    monkeypatch.setattr(wheel_sources.subprocess, "run", pip)
    code, out, _ = compat("--newer")
    assert code == bool(expected)
    assert out.splitlines() == (expected or ["none: the newest in the table is 0.5.23"])


def test_a_pip_that_lists_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(wheel_sources.subprocess, "run", lambda *_, **__: failed)
    code, _, err = compat("--newer")
    assert code == 1
    assert "pip lists no release of sglang: ERROR: No matching distribution" in err


def test_the_table_of_the_docs_is_of_these_releases() -> None:
    """Generated: `sglang-trinv compat --write docs/compatibility.md`."""
    text = (Path(__file__).parents[2] / "docs/compatibility.md").read_text()
    generated = text.split(reports.BEGIN)[1].split(reports.END)[0]
    rows = [line.split("|")[1:-1] for line in generated.splitlines() if line.startswith("| 0.")]
    assert [row[0].strip() for row in rows] == list(targets.RELEASES)
    for row in rows:
        assert row[4].strip() == "as expected"
        ours, stock = (float(x) for x in row[5].split("/"))
        assert 0 < ours <= 1.2 * stock


def test_write_replaces_the_table_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{reports.BEGIN}old\n{reports.END}after\n")
    code, _, _ = compat("--release", MIDDLE, "--no-chain", "--write", str(path))
    assert code == 0
    text = path.read_text()
    assert text.startswith(f"before\n{reports.BEGIN}\n| SGLang |")
    assert text.endswith(f"| not run | refused |\n\n{reports.END}after\n")
    assert "old" not in text
    path.write_text("no marks")
    code, _, err = compat("--release", MIDDLE, "--no-chain", "--write", str(path))
    assert code == 1
    assert "error: --write: want a file with the lines" in err
