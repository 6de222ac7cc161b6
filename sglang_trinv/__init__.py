"""Faster triangular inverse for the Gated DeltaNet prefill of SGLang.

``solve_tril``, ``kkt_solve`` and ``fwd_intra`` take SGLang's arguments in SGLang's order. They are
imported on first use: ``import sglang_trinv`` itself touches neither torch nor a GPU.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "sglang_trinv.config",
    "TrinvError": "sglang_trinv.errors",
    "UnsupportedCall": "sglang_trinv.errors",
    "chunk_kda_fwd_intra": "sglang_trinv.ops",
    "fwd_intra": "sglang_trinv.ops",
    "kkt_solve": "sglang_trinv.ops",
    "patched": "sglang_trinv.patching",
    "solve_tril": "sglang_trinv.ops",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
