"""The patches on the files of the real wheels: byte for byte, all or nothing, never by guess."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_trinv import cli, targets
from sglang_trinv.patches import apply as patcher

FILE = "sglang/srt/layers/attention/attention_registry.py"
NOBODY = 65534


@pytest.fixture(params=targets.PATCHED)
def release(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def site(sources: Path, tmp_path: Path) -> Path:
    """A folder with the release's files as pip would install them."""
    return Path(shutil.copytree(sources, tmp_path / "site"))


def patch(*arguments: str, site: Path) -> str:
    """Output of a run that succeeds."""
    result = CliRunner().invoke(cli.app, ["patch", *arguments, "--site", str(site)])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    """The one line on stderr of a run that fails."""
    result = CliRunner().invoke(cli.app, ["patch", *arguments])
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    return line


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_applies_reverses_and_applies_again(site: Path, release: str) -> None:
    released = content(site)
    assert "is not applied" in patch("--check", site=site)
    assert "is applied" in patch("--apply", site=site)
    patched = content(site)
    assert [name for name in released if released[name] != patched[name]] == [FILE]
    assert patched.keys() == released.keys()  # no draft is left
    assert patched[FILE].startswith(released[FILE])
    added = patched[FILE][len(released[FILE]) :].decode().split("\n")
    assert [line.partition("  #")[0] for line in added if line] == [
        "import sglang_trinv.plugin",
        "attn_backend_wrapper = sglang_trinv.plugin.wrap(attn_backend_wrapper)",
    ]
    assert "is already applied" in patch("--apply", site=site)
    assert "is applied" in patch("--check", site=site)
    assert "is not applied" in patch("--reverse", site=site)
    assert content(site) == released
    assert "already" in patch("--reverse", site=site)
    patch("--apply", site=site)
    assert content(site) == patched


def test_says_that_kda_is_refused_and_why(site: Path, release: str) -> None:
    last = patch("--apply", site=site).strip().splitlines()[-1]
    assert last == targets.kda_refusal(release)
    assert last.startswith("KDA is refused: ")


@pytest.mark.skipif(not shutil.which("patch"), reason="no program `patch` here")
def test_the_patch_file_is_an_ordinary_one(site: Path) -> None:
    released, found = content(site), patcher.find_patch(patcher.find_site(site))
    command = ["patch", "-p1", "-s", "-d", str(site), "-i", str(patcher.HERE / found.name)]
    subprocess.run(command, check=True)
    assert "is applied" in patch("--check", site=site)
    subprocess.run([*command, "-R"], check=True)
    assert content(site) == released


@pytest.mark.parametrize("option", ["--check", "--apply", "--reverse"])
def test_refuses_a_file_that_is_not_as_released(site: Path, option: str) -> None:
    with (site / FILE).open("a") as file:
        file.write("# mine\n")
    before = content(site)
    (expected,) = patcher.find_patch(patcher.find_site(site)).files
    found = hashlib.sha256(before[FILE]).hexdigest()
    message = refused(option, "--site", str(site))
    assert str(site / FILE) in message
    assert f"want sha256 {expected.before} (patched: {expected.after}), got {found}" in message
    assert content(site) == before


def test_a_missing_file(site: Path) -> None:
    (site / FILE).unlink()
    assert f"cannot read {site / FILE}: No such file" in refused("--apply", "--site", str(site))


def test_a_release_of_another_patch(site: Path) -> None:
    """The version decides which hashes count, and those of another release do not fit."""
    (metadata,) = site.glob("*.dist-info")
    other = "0.5.10" if "-0.5.9" in metadata.name else "0.5.9"
    text = (metadata / "METADATA").read_text().splitlines(keepends=True)
    lines = [f"Version: {other}\n" if x.startswith("Version:") else x for x in text]
    (metadata / "METADATA").write_text("".join(lines))
    assert "is not as SGLang released it" in refused("--apply", "--site", str(site))


@pytest.fixture
def two_files(
    site: Path, release: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> list[str]:
    """The release's patch and a second file of the same folder, so that one can be half done."""
    names = [FILE, "sglang/srt/layers/attention/another.py"]
    shutil.copy(site / names[0], site / names[1])
    found = patcher.find_patch(patcher.find_site(site))
    diff = (patcher.HERE / found.name).read_bytes()
    folder = tmp_path / "patches"
    folder.mkdir()
    second = diff.replace(b"attention_registry.py", b"another.py")
    (folder / found.name).write_bytes(diff + second)
    first = found.files[0]
    entries = "".join(
        f'[[patch.files]]\npath = "{name}"\nbefore = "{first.before}"\nafter = "{first.after}"\n'
        for name in names
    )
    head = f'[[patch]]\nname = "{found.name}"\nreleases = ["{release}"]\n'
    (folder / "ledger.toml").write_text(head + entries)
    monkeypatch.setattr(patcher, "HERE", folder)
    return names


@pytest.mark.parametrize("start", ["--apply", "--reverse"])
@pytest.mark.parametrize("then", ["--apply", "--reverse"])
def test_a_run_cut_off_between_two_files(
    site: Path, two_files: list[str], monkeypatch: pytest.MonkeyPatch, start: str, then: str
) -> None:
    released = content(site)
    patch("--apply", site=site)
    patched = content(site)
    if start == "--apply":
        patch("--reverse", site=site)
    with monkeypatch.context() as killed:
        move, moved = os.replace, []

        def once(source: Path, target: Path) -> None:
            if moved:
                os._exit(9)  # no handler runs, as with SIGKILL
            moved.append(move(source, target))

        killed.setattr(os, "replace", once)
        child = os.fork()
        if not child:
            CliRunner().invoke(cli.app, ["patch", start, "--site", str(site)])
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert set(content(site)) - set(released) == {
        "sglang/srt/layers/attention/.another.py.sglang-trinv"
    }
    assert "is half applied" in patch("--check", site=site)
    patch(then, site=site)
    assert content(site) == (patched if then == "--apply" else released)


def test_an_error_while_drafts_are_written_changes_nothing(
    site: Path, two_files: list[str]
) -> None:
    released = content(site)
    (site / two_files[1]).write_text("something else")
    assert "another.py is not as SGLang" in refused("--apply", "--site", str(site))
    (site / two_files[1]).write_bytes(released[FILE])
    blocked = (site / two_files[1]).with_name(".another.py.sglang-trinv")
    blocked.mkdir()
    message = refused("--apply", "--site", str(site))
    assert message.startswith("error: cannot write")
    blocked.rmdir()
    assert content(site) == released


@pytest.fixture
def read_only(sources: Path) -> Iterator[Path]:
    """A site that this process cannot write: as root, by not being root for a while."""
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(sources, folder, dirs_exist_ok=True)
    root = os.geteuid() == 0
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if root:
        os.seteuid(NOBODY)
    yield folder
    if root:
        os.seteuid(0)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.rmtree(folder)


def test_a_read_only_site(read_only: Path) -> None:
    assert "is not applied" in patch("--check", site=read_only)
    message = refused("--apply", "--site", str(read_only))
    assert message.startswith(f"error: cannot write {read_only}")
    assert message.endswith(": Permission denied")


def test_an_inconsistent_ledger_changes_nothing(
    site: Path, release: str, two_files: list[str]
) -> None:
    name = patcher.find_patch(patcher.find_site(site)).name
    diff = (patcher.HERE / name).read_bytes()
    (patcher.HERE / name).write_bytes(diff.replace(b"+import", b"+import  "))
    before = content(site)
    assert "and ledger.toml differ" in refused("--apply", "--site", str(site))
    assert content(site) == before


class TestArguments:
    """What is refused whatever the release."""

    @pytest.mark.parametrize("options", [(), ("--apply", "--reverse"), ("--check", "--apply")])
    def test_exactly_one_action(self, options: tuple[str, ...]) -> None:
        assert "want one of --check, --apply and --reverse" in refused(*options)

    def test_a_folder_without_sglang(self, tmp_path: Path) -> None:
        message = refused("--check", "--site", str(tmp_path))
        assert message == (
            f"error: --site: want a folder that SGLang is installed in, got {tmp_path}"
        )

    @pytest.mark.parametrize(("version", "says"), [("0.5.20", "no patch"), ("0.5.8", "not in the")])
    def test_other_releases(self, tmp_path: Path, version: str, says: str) -> None:
        info = tmp_path / f"sglang-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
        assert says in refused("--apply", "--site", str(tmp_path))


def test_the_ledger_names_every_release_that_needs_a_patch() -> None:
    found = [release for patch in patcher.ledger() for release in patch.releases]
    assert sorted(found) == sorted(targets.PATCHED)
    files = {path.name for path in patcher.HERE.glob("*.patch")}
    assert files == {patch.name for patch in patcher.ledger()}
