"""Matrix products with the roundings of tensor cores: operands rounded, float32 accumulation.

Operands are rounded as the instructions do it; the accumulation is plain float32, where tensor
cores may keep fewer bits while they align the addends. Triton rounds the parts of tf32x3
(cvt.rna.tf32), but hands unconverted float32 to the unit for tf32, which ignores the low 13 bits:
that is ``tf32rz`` (seen in the PTX of Triton 3.7.1 for sm_80 to sm_120).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def round_tf32(x: Tensor) -> Tensor:
    """Round float32 to 10 mantissa bits, nearest, ties away from zero (cvt.rna.tf32.f32)."""
    bits = x.contiguous().view(torch.int32)
    # Adding half a unit to the magnitude carries into the exponent where it must.
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


def truncate_tf32(x: Tensor) -> Tensor:
    """Cut float32 to 10 mantissa bits, towards zero."""
    truncated = (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isnan(), x, truncated)


def _through(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).to(x.dtype)


def _unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Precision:
    """How the operands of a product are rounded.

    ``x3`` splits an operand into ``hi + lo``, both rounded, and adds three products: hi hi + hi lo
    + lo hi. ``unit`` is the unit roundoff of one rounding, ``tiny`` the absolute error where fp16
    has run out of exponent.
    """

    name: str
    round: Callable[[Tensor], Tensor]
    unit: float
    x3: bool = False
    dtype: torch.dtype = torch.float32
    tiny: float = 0.0

    @property
    def product_error(self) -> float:
        """Bound of |fl(a b) - a b| / |a b| from the operands' rounding alone."""
        u = self.unit
        if self.x3:  # a = hi + lo + u^2, b the same, and lo lo left out
            return 3 * u**2 * (1 + u) ** 2
        return (1 + u) ** 2 - 1 if self.round is not _unchanged else 0.0


PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp16", _through(torch.float16), 2.0**-11, tiny=2.0**-25),
        Precision("bf16", _through(torch.bfloat16), 2.0**-8),
        Precision("tf32", round_tf32, 2.0**-11),
        Precision("tf32rz", truncate_tf32, 2.0**-10),
        Precision("fp32", _unchanged, 2.0**-24),
        Precision("fp64", _unchanged, 2.0**-53, dtype=torch.float64),
        Precision("bf16x3", _through(torch.bfloat16), 2.0**-8, x3=True),
        Precision("tf32x3", round_tf32, 2.0**-11, x3=True),
    )
}


def precision_of(name: str | Precision) -> Precision:
    """The precision of this name; a Precision is returned as it is."""
    if isinstance(name, Precision):
        return name
    if name not in PRECISIONS:
        raise ValueError(f"precision: want one of {', '.join(PRECISIONS)}, got {name!r}")
    return PRECISIONS[name]


def working_dtype(x: Tensor) -> Precision:
    """The precision that rounds nothing away from x: fp64 for float64, else fp32."""
    return PRECISIONS["fp64" if x.dtype == torch.float64 else "fp32"]


def product(a: Tensor, b: Tensor, precision: str | Precision) -> Tensor:
    """a * b with rounded factors, each product in float32 (fp64: float64)."""
    return _with_rounded(torch.mul, a, b, precision_of(precision))


def matmul(a: Tensor, b: Tensor, precision: str | Precision) -> Tensor:
    """a @ b with rounded operands; float32 accumulation and result (fp64: float64)."""
    if a.is_cuda and torch.get_float32_matmul_precision() != "highest":
        raise RuntimeError("torch.set_float32_matmul_precision must be 'highest' to emulate")
    return _with_rounded(torch.matmul, a, b, precision_of(precision))


def _with_rounded(multiply, a, b, p):
    a, b = a.to(p.dtype), b.to(p.dtype)
    a_hi, b_hi = p.round(a), p.round(b)
    if not p.x3:
        return multiply(a_hi, b_hi)
    a_lo, b_lo = p.round(a - a_hi), p.round(b - b_hi)
    return (multiply(a_lo, b_hi) + multiply(a_hi, b_lo)) + multiply(a_hi, b_hi)
