"""``sglang-trinv bundle``: what comes out is what went in, and a damaged bundle is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest
from typer.testing import CliRunner

from sglang_trinv import cli
from sglang_trinv.serve import bundle, bundle_unpack

runner = CliRunner()
NAME = "demo_wheel"


def make_wheel(folder, name=NAME):
    """A wheel of one module, as pip wants it."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "VALUE = 7\n" + "#" * 3000,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A bundle in parts of 1 MiB; pip's downloads are wheels made here."""
    calls = []

    def pip(*arguments):
        calls.append(arguments)
        option = "--wheel-dir" if arguments[0] == "wheel" else "--dest"
        folder = arguments[arguments.index(option) + 1]
        make_wheel(bundle.Path(folder), (NAME, "other_wheel", "added_wheel")[len(calls) - 1])

    monkeypatch.setattr(bundle, "_pip", pip)
    manifest = bundle.pack(tmp_path / "out", add=("x==1",), part_mib=1)
    assert [call[0] for call in calls] == ["wheel", "download", "download"]
    assert "--no-deps" in calls[2]
    assert "--no-deps" not in calls[1]
    names = [name.split("-")[0] for name in manifest["wheels"]]
    assert names == ["added_wheel", NAME, "other_wheel"]
    return tmp_path / "out"


def test_the_script_in_the_bundle_needs_nothing_of_ours(packed, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, str(packed / "unpack.py"), "--target", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 wheels installed\n"
    assert (target / f"{NAME}.py").read_text().startswith("VALUE = 7")
    source = (packed / "unpack.py").read_text()
    assert "sglang_trinv" not in source.replace("sglang-trinv", "")


def test_without_a_target_the_host_keeps_what_it_has(packed, monkeypatch):
    """The package with what it needs, from the bundle alone; what was added, without."""
    calls = []
    monkeypatch.setattr(bundle_unpack, "_install", lambda *arguments: calls.append(arguments))
    bundle_unpack.unpack(packed)
    (find, folder, own), (no_deps, added) = calls
    assert (find, no_deps) == ("--find-links", "--no-deps")
    assert own == f"{folder}/{NAME}-1.0-py3-none-any.whl"
    assert added == f"{folder}/added_wheel-1.0-py3-none-any.whl"


def test_command_line_unpacks(packed, tmp_path):
    result = runner.invoke(
        cli.app, ["bundle", "unpack", str(packed), "--target", str(tmp_path / "s")]
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "s" / "other_wheel.py").is_file()


def refused(folder, *more):
    result = runner.invoke(
        cli.app, ["bundle", "unpack", str(folder), "--target", "/nowhere/x", *more]
    )
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    return line


def test_damaged(packed):
    part = packed / "bundle.tar.00"
    data = bytearray(part.read_bytes())
    data[700] ^= 1
    part.write_bytes(data)
    assert f"{part}: damaged" in refused(packed)
    part.unlink()
    assert f"{part}: No such file" in refused(packed)
    (packed / bundle_unpack.MANIFEST).write_text("{}")
    assert "want schema 1" in refused(packed)
    assert "no bundle" in refused(packed.parent)


def test_another_python(packed):
    path = packed / bundle_unpack.MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"python": "3.9"}))
    assert "packed for Python 3.9" in refused(packed)


def test_parts(tmp_path):
    archive = tmp_path / "a"
    archive.write_bytes(bytes(range(256)) * 10)
    parts = bundle._split(archive, tmp_path, 1000)
    assert [part["bytes"] for part in parts] == [1000, 1000, 560]
    bundle_unpack.join(tmp_path, {"parts": parts}, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == archive.read_bytes()


def test_bad_arguments(tmp_path):
    def run(*arguments):
        result = runner.invoke(cli.app, ["bundle", "pack", *arguments])
        assert result.exit_code == 1
        return result.stderr

    assert "exists" in run("--out", str(tmp_path))
    assert "--python: want 3.N, got 'py3'" in run("--out", str(tmp_path / "x"), "--python", "py3")
