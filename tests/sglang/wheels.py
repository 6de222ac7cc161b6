"""Sources of real SGLang releases: downloaded once, only the files that the tests read are kept.

The cache is ``.cache/wheels`` in the repository, or the folder that TRINV_TEST_CACHE names. A
release that cannot be had is an error: a skipped test would say nothing about it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# A change of what is kept needs a new number: an older folder then no longer counts.
LAYOUT = 1
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
# Any file that mentions one of these is kept, so that a test can tell who else uses it.
KEEP_MENTIONING = (b"chunk_gated_delta_rule_fwd_intra", b"attn_backend_wrapper")


def fetch(releases: Iterable[str], cache: Path) -> dict[str, Path]:
    """Folder of the unpacked sources of each release; what is missing is downloaded in parallel."""
    cache.mkdir(parents=True, exist_ok=True)
    folders = {release: cache / f"sglang-{release}-sources-{LAYOUT}" for release in releases}
    missing = [release for release, folder in folders.items() if not folder.is_dir()]
    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(lambda release: _fetch_one(release, folders[release]), missing))
    return folders


def cache_folder() -> Path:
    default = Path(__file__).parents[2] / ".cache" / "wheels"
    return Path(os.environ.get("TRINV_TEST_CACHE") or default)


def _fetch_one(release: str, folder: Path) -> None:
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".download-"))
    try:
        _download(release, work)
        (wheel,) = work.glob("*.whl")
        unpacked = work / "sources"
        _unpack(wheel, unpacked)
        # Whoever is first wins; two test runs may share the cache.
        if not folder.is_dir():
            unpacked.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(release: str, folder: Path) -> None:
    """Fetch the wheel for one fixed platform: only Python sources are read from it."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--only-binary", ":all:", "--implementation", "cp", "--python-version", "3.12",
        "--platform", "manylinux_2_34_x86_64", "--dest", str(folder), f"sglang=={release}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"sglang {release} was not downloaded: {done.stderr.strip()[-600:]}")


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith(".py"):
                continue
            content = archive.read(name)
            listed = name in KEEP or name.startswith(KEEP_FOLDERS)
            if listed or any(word in content for word in KEEP_MENTIONING):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
