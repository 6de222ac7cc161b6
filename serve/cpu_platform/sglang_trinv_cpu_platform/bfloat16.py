"""bfloat16 arithmetic for Triton's interpreter (Triton 3.7).

The interpreter keeps bfloat16 as uint16 bit patterns, because numpy has no such type, and computes
on the patterns: ``tl.dot`` of two bfloat16 blocks is wrong by many orders of magnitude, and nothing
says so. Here every operation widens to float32, computes, and rounds to nearest even.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

QUIET_NAN = np.uint16(0x7FC0)


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bit patterns; exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns of ``values``, rounded to nearest, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + (np.uint32(0x7FFF) + odd)) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), QUIET_NAN, rounded)


def install() -> Callable[[], None]:
    """Give the interpreter bfloat16 arithmetic; return a function that takes it back."""
    from triton.runtime.interpreter import InterpreterBuilder

    if getattr(InterpreterBuilder, "_trinv_bfloat16", False):
        return lambda: None
    replacements = {**_replacements(InterpreterBuilder), "_trinv_bfloat16": True}
    absent = object()
    originals = {name: vars(InterpreterBuilder).get(name, absent) for name in replacements}
    for name, function in replacements.items():
        setattr(InterpreterBuilder, name, function)

    def undo() -> None:
        while originals:
            name, function = originals.popitem()
            if function is absent:
                delattr(InterpreterBuilder, name)
            else:
                setattr(InterpreterBuilder, name, function)

    return undo


def _replacements(builder: type) -> dict[str, Callable[..., Any]]:
    """Methods of the interpreter's builder with a bfloat16 case before the original one."""
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import TensorHandle

    binary, unary, ternary = builder.binary_op, builder.unary_op, builder.ternary_op
    dot, fma, cast, round_to = (
        builder.create_dot,
        builder.create_fma,
        builder.cast_impl,
        builder.create_fp_to_fp,
    )

    def is_bf16(handle: TensorHandle) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def up(handle: TensorHandle) -> TensorHandle:
        return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle

    def down(values: np.ndarray) -> TensorHandle:
        return TensorHandle(narrow(values), tl.bfloat16)

    def binary_op(self, lhs, rhs, op):
        if not (is_bf16(lhs) and is_bf16(rhs)):
            return binary(self, lhs, rhs, op)
        out = op(up(lhs).data, up(rhs).data)
        return TensorHandle(out, tl.int1) if out.dtype == np.bool_ else down(out)

    def unary_op(self, arg, op):
        return down(op(up(arg).data)) if is_bf16(arg) else unary(self, arg, op)

    def ternary_op(self, lhs, rhs, other, op):
        if not is_bf16(lhs):  # the condition of a select is int1: choosing among bits is right
            return ternary(self, lhs, rhs, other, op)
        return down(op(up(lhs).data, up(rhs).data, up(other).data))

    def create_fma(self, x, y, z):
        return down(fma(self, up(x), up(y), up(z)).data) if is_bf16(z) else fma(self, x, y, z)

    def create_dot(self, a, b, d, *args):
        return dot(self, up(a), up(b), d, *args)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if is_bf16(src) else down(src.data)
        return cast(self, up(src), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if dst_type.scalar == tl.bfloat16 and rounding_mode == ir.ROUNDING_MODE.RTNE:
            return cast_impl(self, src, dst_type)
        return round_to(self, src, dst_type, rounding_mode)

    def get_bf16(self, value):
        return down(np.array([value], dtype=np.float32))

    local = (binary_op, unary_op, ternary_op, create_fma, create_dot, cast_impl, create_fp_to_fp)
    return {function.__name__: function for function in (*local, get_bf16)}
