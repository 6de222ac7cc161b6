"""What the whole prefill needs to know of a release, beside the table in ``targets``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from sglang_trinv.errors import TargetMissing
from sglang_trinv.targets import Target

# The kernels behind --linear-attn-prefill-backend triton.
GDN_TRITON = "sglang.srt.layers.attention.linear.kernels.gdn_triton"


def deterministic(target: Target, runner: Any) -> bool:
    """Whether the server promises the same answer whatever else is in the batch."""
    if target.prefill_flag == "context":
        context = importlib.import_module("sglang.srt.runtime_context")
        return bool(context.get_exec().deterministic.enable_deterministic_inference)
    return bool(getattr(runner.server_args, "enable_deterministic_inference", False))


def triton_gdn_kernel() -> type:
    """SGLang's class of the kernels "triton". Raises TargetMissing: this release has none."""
    return _of_gdn_triton("TritonGDNKernel")


def stocks_chain() -> Callable[..., Any]:
    """The chain of kernels that this class calls. Raises TargetMissing: it calls another one."""
    return _of_gdn_triton("chunk_gated_delta_rule")


def _of_gdn_triton(name: str) -> Any:
    try:
        return getattr(importlib.import_module(GDN_TRITON), name)
    except (ImportError, AttributeError) as error:
        raise TargetMissing(f"{GDN_TRITON}.{name}: {error}") from error
