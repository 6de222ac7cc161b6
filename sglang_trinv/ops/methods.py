"""Names of the inverse's methods, and which implementation a device gets."""

from __future__ import annotations

import os

import torch

from sglang_trinv.errors import UnsupportedCall

#: Method -> operand precision of its products. All are MBH (block doubling) and accumulate in
#: float32. The x3 methods split each operand in two: for keys longer than 1 or beta above 1, where
#: the inverse is no longer bounded (docs/numerics.md#bound). "auto" goes by the result's dtype
#: (AUTO): fp16 products err far less than rounding to bfloat16, but as much as rounding to float16,
#: where fp16x2 splits one operand.
METHODS = {
    "auto": "",
    "mbh_fp16": "fp16",
    "mbh_fp16x2": "fp16x2",
    "mbh_tf32": "tf32",
    "mbh_tf32x3": "tf32x3",
    "mbh_bf16x3": "bf16x3",
}

AUTO = {
    torch.bfloat16: "mbh_fp16",
    torch.float16: "mbh_fp16x2",
    torch.float32: "mbh_bf16x3" if torch.version.hip else "mbh_tf32x3",
}


def dot_precision(method: str, device: torch.device, result: torch.dtype) -> str:
    """Operand precision of ``method`` for a ``result`` dtype on ``device``, as the kernels want it.

    Raises:
        UnsupportedCall: unknown method, or a precision that the device's compiler lacks.
    """
    if method not in METHODS:
        raise UnsupportedCall(f"method: want one of {', '.join(METHODS)}, got {method!r}")
    if method == "auto":
        method = AUTO[result]
    if device.type == "cuda" and torch.version.hip and METHODS[method] == "tf32x3":
        raise UnsupportedCall("method: mbh_tf32x3 needs an NVIDIA GPU; use mbh_bf16x3 on ROCm")
    if interpreted() and not METHODS[method].startswith("fp16"):
        return "ieee"  # the interpreter multiplies float32 operands in float32 under every name
    return METHODS[method]


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def implementation(device: torch.device | str) -> str:
    """What runs an op on tensors of ``device``: "triton", "triton-interpreter" or "torch"."""
    if torch.device(device).type == "cuda":
        return "triton"
    return "triton-interpreter" if interpreted() else "torch"
