"""The methods of ``algorithms.py`` by name, with what each costs and whether it can be trusted."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from sglang_trinv.reference import algorithms
from sglang_trinv.reference.precision import Precision, precision_of

SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Method:
    """A way to compute (I + A)^-1.

    ``matmuls(n)`` counts the products of full n x n matrices (FS: of blocks), ``depth(n)`` the
    longest chain of dependent steps, a product or a vector operation each. ``exact(n)`` says
    whether the result is the inverse in exact arithmetic, ``stable`` whether the error on inputs
    with |k| <= 1, beta <= 1 and g <= 0 keeps to ``bounds.rounding_bound``.
    """

    name: str
    function: Callable[[Tensor, Precision], Tensor]
    matmuls: Callable[[int], int]
    depth: Callable[[int], int]
    stable: bool
    exact: Callable[[int], bool] = lambda n: True

    @property
    def description(self) -> str:
        """Definition, cost, stability and source: the docstring of the algorithm."""
        function = self.function
        return inspect.getdoc(function.func if isinstance(function, partial) else function)


def _log2(n: int) -> int:
    return n.bit_length() - 1


def _doublings(n: int, block: int) -> int:
    """Merges from blocks of this size to n."""
    return max(_log2(n) - _log2(block), 0)


def _mxr(block: int) -> Method:
    first = 2 * _log2(block) - 2
    return Method(
        f"MXR{block}",
        partial(algorithms.mixed_recursion, block=block),
        matmuls=lambda n: first + 2 * _doublings(n, block),
        depth=lambda n: _log2(block) + 2 * _doublings(n, block),
        stable=block <= 4,
    )


def _newton_schulz(rounds: int) -> Method:
    return Method(
        f"NS{rounds}",
        partial(algorithms.newton_schulz, rounds=rounds),
        matmuls=lambda n: 2 * rounds - 2,
        depth=lambda n: 2 * rounds - 2,
        stable=False,
        exact=lambda n: 2**rounds >= n,
    )


def _neumann(order: int) -> Method:
    return Method(
        f"Neumann{order}",
        partial(algorithms.truncated_neumann, order=order),
        matmuls=lambda n: order + 1,
        depth=lambda n: order + 1,
        stable=False,
        exact=lambda n: 2 * (order + 1) >= n,
    )


def _block_row_matmuls(n: int, block: int = 16) -> int:
    m = n // block
    return sum((m - d) * (d + 1) for d in range(1, m))


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("VCS", algorithms.column_sweep, lambda n: 0, lambda n: n - 1, stable=True),
        Method(
            "MCS", algorithms.matrix_column_sweep, lambda n: n - 2, lambda n: n - 2, stable=True
        ),
        Method(
            "MCH",
            algorithms.cayley_hamilton,
            matmuls=lambda n: 2 * _log2(n) - 2,
            depth=_log2,
            stable=False,
        ),
        Method(
            "MBH",
            algorithms.bunch_hopcroft,
            matmuls=lambda n: 2 * _log2(n) - 2,
            depth=lambda n: 2 * _log2(n) - 2,
            stable=True,
        ),
        Method(
            "MBH16",
            algorithms.bunch_hopcroft_blocks,
            matmuls=lambda n: 6 + _block_row_matmuls(n),
            depth=lambda n: 6 + 2 * (n // 16 - 1),
            stable=True,
        ),
        *(_mxr(block) for block in (16, 8, 4)),
        *(_newton_schulz(rounds) for rounds in (3, 4, 5, 6, 7)),
        Method(
            "NS_scaled",
            partial(algorithms.newton_schulz, scaled=True),
            matmuls=lambda n: 4 * _log2(n) + 4,
            depth=lambda n: 4 * _log2(n) + 4,
            stable=True,
            exact=lambda n: False,
        ),
        *(_neumann(order) for order in (3, 7, 15, 31)),
        Method(
            "FS16",
            partial(algorithms.substitute_then_rows, block=16),
            matmuls=_block_row_matmuls,
            depth=lambda n: 15 + 2 * (n // 16 - 1),
            stable=True,
        ),
        Method(
            "FS8",
            partial(algorithms.substitute_then_double, block=8),
            matmuls=lambda n: 2 * _doublings(n, 8),
            depth=lambda n: 7 + 2 * _doublings(n, 8),
            stable=True,
        ),
    )
}


def invert(A: Tensor, method: str = "MBH", precision: str | Precision = "fp16") -> Tensor:
    """Compute (I + A)^-1 with a named method and emulated precision.

    Args:
        A ([..., n, n]): n is 16, 32, 64 or 128; entries on and above the diagonal are not read.
        method (str): a name in ``METHODS``.
        precision (str | Precision): a name in ``PRECISIONS``; operands of products are rounded.
    Returns:
        X ([..., n, n], float32; float64 for fp64): not finite where the method overflows.
    """
    if method not in METHODS:
        raise ValueError(f"method: want one of {', '.join(METHODS)}, got {method!r}")
    n = A.shape[-1]
    if A.dim() < 2 or A.shape[-2] != n or n not in SIZES:
        raise ValueError(f"A: want [..., n, n] with n in {SIZES}, got {tuple(A.shape)}")
    p = precision_of(precision)
    return METHODS[method].function(A.to(p.dtype).tril(-1), p)
