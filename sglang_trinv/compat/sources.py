"""Sources of SGLang releases: downloaded with pip and unpacked, never installed.

Only the files that somebody reads are kept, 3 MB a release. A release that cannot be had is an
error: leaving it out would say nothing about it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.version import InvalidVersion, Version

from sglang_trinv import targets
from sglang_trinv.errors import TrinvError

# A change of what is kept needs a new number: an older folder then no longer counts.
LAYOUT = 2
KEEP = (
    "sglang/cli/serve.py",
    "sglang/launch_server.py",
    "sglang/srt/configs/hybrid_arch.py",
    "sglang/srt/entrypoints/engine.py",
    "sglang/srt/layers/attention/attention_registry.py",
    "sglang/srt/layers/attention/hybrid_linear_attn_backend.py",
    "sglang/srt/layers/attention/linear/gdn_backend.py",
    "sglang/srt/layers/attention/linear/kernels/gdn_triton.py",
    "sglang/srt/layers/attention/linear/utils.py",
    "sglang/srt/managers/data_parallel_controller.py",
    "sglang/srt/managers/detokenizer_manager.py",
    "sglang/srt/managers/scheduler.py",
    "sglang/srt/model_executor/model_runner.py",
    "sglang/srt/runtime_context.py",
    "sglang/srt/server_args.py",
)
KEEP_FOLDERS = (
    "sglang/kernels/ops/attention/fla/",
    "sglang/srt/layers/attention/fla/",
    "sglang/srt/plugins/",
)
# Any file that mentions one of these is kept, so that a check can tell who else uses it.
KEEP_MENTIONING = (b"chunk_gated_delta_rule_fwd_intra", b"attn_backend_wrapper", b"solve_tril")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


class SourcesError(TrinvError):
    """The sources of a release are not to be had."""


def cache_folder() -> Path:
    """Where the command keeps what it has downloaded."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sglang-trinv" / "wheels"


def fetch(releases: Iterable[str], cache: Path) -> dict[str, Path]:
    """Folder of the unpacked sources of each release; what is missing is downloaded in parallel.

    Raises:
        SourcesError: pip cannot download one of them.
    """
    cache.mkdir(parents=True, exist_ok=True)
    folders = {release: cache / f"sglang-{release}-sources-{LAYOUT}" for release in releases}
    missing = [release for release, folder in folders.items() if not folder.is_dir()]
    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(lambda release: _fetch_one(release, folders[release]), missing))
    return folders


def find(release: str, cache: Path) -> tuple[str, Path]:
    """Release number and sources of ``release``: a number that pip knows, or a folder.

    A folder is one that holds ``sglang``: ``python`` in a clone of SGLang, or an unpacked wheel.

    Raises:
        SourcesError: it is neither.
    """
    folder = Path(release)
    if folder.is_dir():
        if not (folder / "sglang/srt").is_dir():
            raise SourcesError(f"--release: no sglang/srt in the folder {release}")
        return _number(folder), folder
    try:
        number = str(Version(release))
    except InvalidVersion:
        raise SourcesError(
            f"--release: want a release number or a folder that holds sglang, got {release!r}"
        ) from None
    return number, fetch([number], cache)[number]


def not_in_table() -> list[str]:
    """Releases that pip knows and the table does not, from its first one on; oldest first.

    Pre-releases count only if they are newer than the whole table.

    Raises:
        SourcesError: pip cannot list them.
    """
    done = subprocess.run(
        [*PIP, "index", "versions", "--pre", "sglang"], capture_output=True, text=True, timeout=300
    )
    listed = re.search(r"^Available versions: (.*)$", done.stdout, re.M)
    if done.returncode or not listed:
        raise SourcesError(f"pip lists no release of sglang: {done.stderr.strip()[-300:]}")
    known = {Version(release) for release in targets.RELEASES}
    found = sorted(Version(text.strip()) for text in listed[1].split(","))
    return [
        str(v)
        for v in found
        if v not in known and v > (max(known) if v.is_prerelease else min(known))
    ]


def _number(folder: Path) -> str:
    version = folder / "sglang/version.py"
    text = version.read_text() if version.is_file() else ""
    found = re.search(r"__version__ = ['\"]([^'\"]+)", text)
    return found[1] if found else "0.0.0.dev0"


def _fetch_one(release: str, folder: Path) -> None:
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".download-"))
    try:
        _download(release, work)
        (wheel,) = work.glob("*.whl")
        unpacked = work / "sources"
        _unpack(wheel, unpacked)
        # Whoever is first wins; two runs may share the cache.
        if not folder.is_dir():
            unpacked.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(release: str, folder: Path) -> None:
    """Fetch the wheel for one fixed platform: only Python sources are read from it."""
    command = [
        *PIP, "download", "--quiet", "--no-deps", "--only-binary", ":all:",
        "--implementation", "cp", "--python-version", "3.12",
        "--platform", "manylinux_2_34_x86_64", "--dest", str(folder), f"sglang=={release}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        last = last.removeprefix("ERROR: ")
        raise SourcesError(f"SGLang {release} was not downloaded: {last}")


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            metadata = name.endswith(".dist-info/METADATA")
            if not name.endswith(".py") and not metadata:
                continue
            content = archive.read(name)
            listed = metadata or name in KEEP or name.startswith(KEEP_FOLDERS)
            if listed or any(word in content for word in KEEP_MENTIONING):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
