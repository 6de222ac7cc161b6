"""A Triton cache that can be written, also where the one that was asked for cannot.

Triton fails a kernel, and SGLang then the server, when a compiled kernel cannot be stored: a
read-only folder or a full disk. Compiling again at every start is slower and serves.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

VARIABLE = "TRITON_CACHE_DIR"
LEAST_BYTES = 16 << 20  # a server's kernels; less left on the disk is as good as full


def ensure_writable() -> str:
    """Point Triton to a temporary folder if its cache cannot be written; return why, or ""."""
    from triton import knobs

    reason = unwritable(Path(knobs.cache.dir))
    if not reason:
        return ""
    for parent in (Path(tempfile.gettempdir()), Path("/dev/shm")):
        if not unwritable(parent):
            os.environ[VARIABLE] = tempfile.mkdtemp(prefix="sglang-trinv-triton-", dir=parent)
            break
    else:
        return f"{reason}, and neither can a temporary folder"
    logger.warning("sglang_trinv: %s; kernels go to %s", reason, os.environ[VARIABLE])
    return reason


def unwritable(folder: Path) -> str:
    """Why compiled kernels cannot be stored in ``folder``, or ""."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, LEAST_BYTES)
    except OSError as error:
        return f"the Triton cache {folder} cannot be written ({error.strerror or error})"
    return ""
