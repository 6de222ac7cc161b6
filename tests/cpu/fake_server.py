"""What the installer sees of a server: modules under SGLang's names, a runner, a built backend."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from sglang_trinv import targets

RELEASE = "0.5.20"
TARGET = targets.find(RELEASE)


def stock(k, v, g=None, beta=None, cu_seqlens=None, chunk_size=64, chunk_indices=None):
    return "w", "u", "A"


def runner(**changes: Any) -> SimpleNamespace:
    """A runner of Qwen3.5-27B's GDN layers on one rank of four."""
    gdn = SimpleNamespace(linear_num_key_heads=16, linear_num_value_heads=48)
    state = torch.empty(48, 2, 12, 128, 128, device="meta")
    return SimpleNamespace(
        **{
            "device": "cpu",
            "is_draft_worker": False,
            "model_config": SimpleNamespace(gdn=gdn, dtype=torch.bfloat16),
            "req_to_token_pool": SimpleNamespace(
                mamba_pool=SimpleNamespace(mamba_cache=SimpleNamespace(temporal=state))
            ),
            **changes,
        }
    )


WITHOUT_GDN = {"model_config": SimpleNamespace(gdn=None, dtype=torch.bfloat16)}


def backend(kernel: str) -> SimpleNamespace:
    made = type(kernel, (), {})()
    dispatcher = SimpleNamespace(extend_kernel=made)
    return SimpleNamespace(linear_attn_backend=SimpleNamespace(kernel_dispatcher=dispatcher))


def holders(server: dict[str, ModuleType]) -> list[Any]:
    return [getattr(server[name], TARGET.function) for name in TARGET.holders]
