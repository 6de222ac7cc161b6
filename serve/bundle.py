"""Bundles for hosts without a network: this package and what it needs, in parts to be copied.

A part is small enough for a channel that takes small files; every part has its sha256 in the
manifest. torch, triton and sglang are the host's own unless they are asked for.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sglang_trinv import __version__
from sglang_trinv.serve import bundle_unpack
from sglang_trinv.serve.config import ServeError

ROOT = Path(__file__).parents[1]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PLATFORMS = ("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64")
PART_MIB = 60
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def pack(
    out: Path,
    python: str = PYTHON,
    platforms: tuple[str, ...] = PLATFORMS,
    add: tuple[str, ...] = (),
    part_mib: int = PART_MIB,
) -> dict[str, Any]:
    """Write a bundle.

    Args:
        out: folder to make; must not exist.
        python: version of the host's Python, as ``3.12``.
        platforms: wheel platforms that the host takes.
        add: requirements to put in besides, without what they need: ``sglang==0.5.20``.
        part_mib: largest part in MiB.
    Returns:
        The manifest.
    Raises:
        ServeError: the folder exists, this is no clone, or pip fails.
    """
    if out.exists():
        raise ServeError(f"--out: {out} exists")
    if not (ROOT / "pyproject.toml").is_file():
        raise ServeError("bundle pack: want a clone of the repository, to build the wheel from")
    with tempfile.TemporaryDirectory() as scratch:
        wheels = Path(scratch) / "wheels"
        _pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT))
        (own,) = wheels.glob("*.whl")
        target = ["--only-binary=:all:", "--python-version", python, "--dest", str(wheels)]
        target += [word for name in platforms for word in ("--platform", name)]
        _pip("download", *target, str(own))
        needed = set(wheels.iterdir())
        if add:
            _pip("download", "--no-deps", *target, *add)
        wanted = [own.name, *sorted(path.name for path in set(wheels.iterdir()) - needed)]
        archive = Path(scratch) / "bundle.tar"
        names = sorted(wheel.name for wheel in wheels.glob("*.whl"))
        with tarfile.open(archive, "w") as tar:
            for name in names:
                tar.add(wheels / name, name)
        out.mkdir(parents=True)
        parts = _split(archive, out, part_mib << 20)
    manifest = {
        "schema": bundle_unpack.SCHEMA,
        "version": __version__,
        "python": python,
        "platforms": platforms,
        "packed": datetime.now(UTC).isoformat(timespec="seconds"),
        "wanted": wanted,
        "wheels": names,
        "parts": parts,
    }
    (out / bundle_unpack.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.copy(bundle_unpack.__file__, out / "unpack.py")
    return manifest


def _split(archive: Path, out: Path, size_bytes: int) -> list[dict[str, Any]]:
    parts = []
    with archive.open("rb") as source:
        while data := source.read(size_bytes):
            name = f"bundle.tar.{len(parts):02}"
            (out / name).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            parts.append({"name": name, "bytes": len(data), "sha256": digest})
    return parts


def _pip(*arguments: str) -> None:
    done = subprocess.run([*PIP, *arguments], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise ServeError(f"pip {arguments[0]}: {lines[-1]}")
