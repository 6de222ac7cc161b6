"""What a user installs: the sdist and the wheel, and that pip finds no fault with them."""

from __future__ import annotations

import fcntl
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sglang_trinv

ROOT = Path(__file__).parents[2]
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def build(hook: str, source: Path, out: Path) -> Path:
    """What pip does to make a distribution, with the setuptools that is installed here."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, hook, str(out)],
        cwd=source, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """setuptools works in the source folder: so one process at a time."""
    out = tmp_path_factory.mktemp("sdist")
    with (ROOT / "pyproject.toml").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build("build_sdist", ROOT, out)


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from the sdist alone, so what the sdist lacks the wheel lacks too."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return zipfile.ZipFile(build("build_wheel", source, folder))


def test_wheel_is_pure_python_and_has_one_package(wheel: zipfile.ZipFile) -> None:
    assert Path(wheel.filename).name == f"sglang_trinv-{sglang_trinv.__version__}-py3-none-any.whl"
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert top == {"sglang_trinv", f"sglang_trinv-{sglang_trinv.__version__}.dist-info"}


def test_wheel_has_every_module_and_the_files_that_they_read(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    own = {p.relative_to(ROOT).as_posix() for p in (ROOT / "sglang_trinv").rglob("*.py")}
    assert own <= names
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, folder in folders["package-dir"].items():
        if package == "sglang_trinv":
            continue
        inside = package.replace(".", "/")
        for path in (ROOT / folder).glob("*.py"):
            assert f"{inside}/{path.name}" in names
    assert {
        "sglang_trinv/py.typed",
        "sglang_trinv/patches/ledger.toml",
        "sglang_trinv/patches/sglang-0.5.9.patch",
        "sglang_trinv/patches/sglang-0.5.10.patch",
        "sglang_trinv/serve/tiny_model/model.safetensors",
        "sglang_trinv/serve/tiny_model/tokenizer.json",
    } <= names


def test_sdist_has_what_a_reader_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Version"] == sglang_trinv.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    needed = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    always = {r.name for r in needed if not r.marker}
    assert not always & {"torch", "triton", "sglang"}  # sglang brings its own builds
    entry_points = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "trinv = sglang_trinv.plugin:register" in entry_points


def test_wheel_installs_and_imports_by_itself(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked into an empty folder, no file of the repository in reach."""
    wheel.extractall(tmp_path)
    code = (
        "import sys, sglang_trinv, sglang_trinv.patches.apply as p, sglang_trinv.serve.config\n"
        "assert sglang_trinv.__file__.startswith(sys.argv[1]), sglang_trinv.__file__\n"
        "assert p.__file__.startswith(sys.argv[1]) and len(p.ledger()) == 2"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""}, cwd=tmp_path,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_pip_check_names_us_nowhere() -> None:
    """Beside the SGLang that is installed here; other people's lines are theirs."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip()
    assert [x for x in done.stdout.splitlines() if re.search(r"sglang[-_]trinv", x)] == []


@pytest.mark.parametrize("release", ["0.5.20", "0.5.23"])
def test_our_requirements_and_sglangs_agree(release: str) -> None:
    """One version of each shared package satisfies both: `pip check` can be clean beside it."""
    from sglang_trinv.compat import sources
    from tests.sglang.wheels import cache_folder

    folder = sources.fetch([release], cache_folder())[release]
    (path,) = folder.glob("*.dist-info/METADATA")
    theirs: dict[str, list[Requirement]] = {}
    for text in Parser().parsestr(path.read_text()).get_all("Requires-Dist"):
        requirement = Requirement(text)
        theirs.setdefault(requirement.name.lower(), []).append(requirement)
    for text in importlib.metadata.requires("sglang-trinv") or []:
        ours = Requirement(text)
        if ours.marker is not None or ours.name not in theirs:
            continue
        installed = importlib.metadata.version(ours.name)
        for other in theirs[ours.name]:
            exact = [s.version for s in other.specifier if s.operator == "=="]
            for version in exact or [installed]:
                assert ours.specifier.contains(version), f"{ours} beside {other}"
                assert other.specifier.contains(version), f"{ours} beside {other}"


def test_the_changelog_names_this_version() -> None:
    assert f"## {sglang_trinv.__version__}" in (ROOT / "CHANGELOG.md").read_text()
