"""Unpack a bundle that ``sglang-trinv bundle pack`` wrote: ``python3 unpack.py [--target DIR]``.

Standard library alone and a copy of itself in every bundle, because the host that it is for has
nothing of ours yet and reaches no network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

MANIFEST = "manifest.json"
SCHEMA = 1


class BundleError(Exception):
    """A bundle is not whole, or not for this Python. One line."""


def read_manifest(folder: Path) -> dict:
    """The manifest of the bundle in ``folder``.

    Raises:
        BundleError: there is none, or it is of another kind.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder}: no bundle: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise BundleError(f"{folder / MANIFEST}: want schema {SCHEMA}")
    return manifest


def join(folder: Path, manifest: dict, archive: Path) -> None:
    """Write the archive out of its parts, each checked against the manifest."""
    with archive.open("wb") as out:
        for part in manifest["parts"]:
            path = folder / part["name"]
            try:
                data = path.read_bytes()
            except OSError as error:
                raise BundleError(f"{path}: {error.strerror}") from None
            if hashlib.sha256(data).hexdigest() != part["sha256"]:
                raise BundleError(f"{path}: damaged: its sha256 is not the manifest's")
            out.write(data)


def unpack(folder: Path, target: Path | None = None, force: bool = False) -> list[str]:
    """Install the wheels of a bundle with pip, without a network.

    Args:
        target: folder to install all wheels into, for PYTHONPATH; without it this Python's
            site-packages get those that are missing or too old there.
        force: also if the bundle was packed for another Python.
    Returns:
        Names of the wheels.
    Raises:
        BundleError: damaged, incomplete, for another Python, or pip fails.
    """
    manifest = read_manifest(folder)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if manifest["python"] != here and not force:
        raise BundleError(f"packed for Python {manifest['python']}, this is {here} (--force)")
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "bundle.tar"
        join(folder, manifest, archive)
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        wheels = sorted(Path(scratch).glob("*.whl"))
        if [wheel.name for wheel in wheels] != manifest["wheels"]:
            raise BundleError(f"{folder}: the wheels are not the manifest's")
        if target:
            _install("--no-deps", "--upgrade", "--target", str(target), *map(str, wheels))
        else:  # what the host has stays, if it is new enough
            own, *added = (str(Path(scratch) / name) for name in manifest["wanted"])
            _install("--find-links", scratch, own)
            if added:
                _install("--no-deps", *added)
    return manifest["wheels"]


def _install(*arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index"]
    done = subprocess.run([*pip, *arguments], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise BundleError(f"pip: {lines[-1]}")


def main() -> int:
    """Unpack the bundle that this file lies in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, help="folder to install into, for PYTHONPATH")
    parser.add_argument("--force", action="store_true", help="also for another Python")
    arguments = parser.parse_args()
    try:
        wheels = unpack(Path(__file__).parent, arguments.target, arguments.force)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(wheels)} wheels installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
