"""What can be promised about (I + A)^-1 before anything is computed.

Condition. With B = diag(beta) and N the strictly lower part of G = decay * K K^T, A = B N and
(I + A)^-1 B = (B^-1 + N)^-1. G is a Schur product of two positive semidefinite kernels (for g <= 0
the decay is exp(-|g_i - g_j|)), so N + N^T = G - diag(|k|^2) >= -max |k|^2 I, and the symmetric
part of B^-1 + N is at least 1 / max beta - max |k|^2 / 2. Where that is positive its inverse bounds
the norm of (I + A)^-1 B: 2 for |k| <= 1 and beta <= 1.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from sglang_trinv.reference.precision import Precision, precision_of


def condition_bound(beta_max: float, key_norm_max: float = 1.0) -> float:
    """Bound of ||(I + A)^-1 diag(beta)||_2 over all chunks with g <= 0; inf where there is none."""
    room = 1 / beta_max - key_norm_max**2 / 2
    return 1 / room if room > 0 else math.inf


def rounding_bound(n: int, precision: str | Precision) -> float:
    """Relative Frobenius error expected of a stable method on inputs inside the bound.

    Each of the n^2 / 2 entries of X is wrong by about the unit roundoff v of a product's operands,
    and ||X||_F >= sqrt(n): together sqrt(n / 2) v, where v is half of ``product_error`` and 2 units
    of the accumulator. An estimate, not a proof: worst-case bounds of block recursion follow every
    rounding error at its largest and are useless here (they exceed 1 for fp16 at n = 64). Measured
    errors are below half of it for rounded operands, below 0.7 of it for fp64.
    """
    p = precision_of(precision)
    accumulator = torch.finfo(p.dtype).eps / 2
    return math.sqrt(n / 2) * (p.product_error / 2 + 2 * accumulator)


def power_growth(A: Tensor) -> Tensor:
    """How much larger the powers of A are than the inverse, for every matrix of A [..., n, n].

    ||(I - |A|)^-1||_F / ||(I + A)^-1||_F: the sum of the powers without the cancellation that makes
    the inverse small, 5e17 at n = 64 for equal keys. The relative error of methods that multiply
    powers of A (MCH, Newton-Schulz from I) stays below one unit roundoff times this and for equal
    keys comes close to it.
    """
    A = A.double().tril(-1)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    solve = partial(torch.linalg.solve_triangular, upper=False, unitriangular=True)
    largest, inverse = solve(-A.abs(), eye), solve(A, eye)
    return torch.linalg.matrix_norm(largest) / torch.linalg.matrix_norm(inverse)
