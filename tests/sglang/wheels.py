"""Where the tests keep the sources of SGLang's releases."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``.cache/wheels`` in the repository, or the folder that TRINV_TEST_CACHE names."""
    default = Path(__file__).parents[2] / ".cache" / "wheels"
    return Path(os.environ.get("TRINV_TEST_CACHE") or default)
