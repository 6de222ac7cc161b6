"""Where a measurement comes from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

import sglang_trinv

ROOT = Path(__file__).parents[1]
SGLANG_SOURCES = "sglang/kernels/ops/attention/fla"


def provenance(sglang: str | None, sglang_release: str | None) -> dict[str, Any]:
    """Commit, versions, GPU, command line and time, for the JSON of a run."""
    properties = torch.cuda.get_device_properties()
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": ["python", "-m", "benchmarks", *map(_without_folder, sys.argv[1:])],
        "commit": commit(),
        "gpu": properties.name,
        "gpu_sms": properties.multi_processor_count,
        "gpu_l2_bytes": properties.L2_cache_size,
        "driver": _driver(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "sglang_trinv": sglang_trinv.__version__,
            "sglang": sglang_release,
            "fla-core": _version_of("fla", "fla-core"),
            "flashinfer": _version_of("flashinfer", "flashinfer-python"),
        },
        "sglang_sources_sha256": _hashes(sglang),
    }


def commit() -> str:
    """The checkout's commit, "+changes" if files differ from it; COMMIT names it without git."""
    if (ROOT / "COMMIT").is_file():
        return (ROOT / "COMMIT").read_text().strip()
    head = _git("rev-parse", "HEAD")
    return (head + ("+changes" if _git("status", "--porcelain") else "")) or "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def _without_folder(argument: str) -> str:
    """Where files lay on the machine that measured says nothing."""
    return Path(argument).name if argument.startswith("/") else argument


def _version_of(module: str, distribution: str) -> str | None:
    """None if it took no part."""
    if module not in sys.modules:
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules[module], "__version__", "unknown")


def _hashes(sglang: str | None) -> dict[str, str]:
    """Of the measured files of SGLang: a folder of sources says nothing about its release."""
    if not sglang:
        return {}
    names = ("chunk_fwd.py", "wy_fast.py", "chunk_intra.py", "solve_tril.py", "kda.py")
    paths = [Path(sglang) / SGLANG_SOURCES / name for name in names]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in paths if p.is_file()}
