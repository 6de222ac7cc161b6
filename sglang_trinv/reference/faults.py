"""Inverses that are wrong or coarse on purpose: what an accuracy gate must tell from the right one.

``SGLANG_TRINV_FAULT`` puts one of them in the place of the kernel (``sglang_trinv.dispatch``). For
tests and for the self-test of the evaluations alone; plain torch, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sglang_trinv.reference.algorithms import bunch_hopcroft, cayley_hamilton, mixed_recursion
from sglang_trinv.reference.chunk import CHUNK_SIZE, chunk_A
from sglang_trinv.reference.exact import matmul
from sglang_trinv.reference.layout import ChunkLayout, expand_heads
from sglang_trinv.reference.methods import METHODS, invert
from sglang_trinv.reference.precision import PRECISIONS

EXACT = PRECISIONS["fp32"]
BLOCK = 16


def _rounded(A: Tensor) -> Tensor:
    """The exact inverse, A and the result rounded to bfloat16: as harmless as storing it."""
    return bunch_hopcroft(A.bfloat16().float(), EXACT).bfloat16().float()


def _within_blocks(A: Tensor, size: int) -> Tensor:
    """The merges of diagonal blocks of this size to larger ones are left out."""
    number = torch.arange(A.shape[-1], device=A.device) // size
    return torch.where(number[:, None] == number[None, :], bunch_hopcroft(A, EXACT), 0.0)


def _dropped_block(A: Tensor) -> Tensor:
    """The correction block below the first diagonal one, rows 16-31 of columns 0-15, is missing."""
    X = bunch_hopcroft(A, EXACT)
    X[..., BLOCK : 2 * BLOCK, :BLOCK] = 0.0
    return X


def _transposed_block(A: Tensor) -> Tensor:
    """The block next to the last diagonal one is stored transposed."""
    X = bunch_hopcroft(A, EXACT)
    corner = X[..., -BLOCK:, -2 * BLOCK : -BLOCK]
    X[..., -BLOCK:, -2 * BLOCK : -BLOCK] = corner.mT.clone()
    return X


def _wrong_sign(A: Tensor) -> Tensor:
    """(I - A)^-1."""
    return bunch_hopcroft(-A, EXACT)


#: Fault -> inverse of ``I + A`` for strictly lower float32 A [..., 64, 64].
INVERSES: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16_rounding": _rounded,
    "bf16_inverse": partial(bunch_hopcroft, precision=PRECISIONS["bf16"]),
    "mxr16": partial(mixed_recursion, precision=PRECISIONS["fp16"], block=BLOCK),
    "doubling": partial(cayley_hamilton, precision=PRECISIONS["fp16"]),
    "no_merges": partial(_within_blocks, size=BLOCK),
    "last_merge": partial(_within_blocks, size=2 * BLOCK),
    "dropped_block": _dropped_block,
    "transposed_block": _transposed_block,
    "wrong_sign": _wrong_sign,
}


def inverse(fault: str) -> Callable[[Tensor], Tensor] | None:
    """The inverse called ``fault``: of ``INVERSES``, or METHOD-PRECISION of ``methods``; else
    None."""
    if fault in INVERSES:
        return INVERSES[fault]
    method, _, precision = fault.partition("-")
    if method not in METHODS or precision not in PRECISIONS:
        return None
    return partial(invert, method=method, precision=precision)


@torch.no_grad()
def fwd_intra(
    fault: str,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int = CHUNK_SIZE,
    chunk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.fwd_intra`` with the inverse called ``fault``; everything else is exact.

    Returns:
        w (like k, [B, T, H, K]), u (like v), Ai (like k, [B, T, H, 64]).
    """
    B, T, H = v.shape[:3]
    layout = ChunkLayout.of(B, T, cu_seqlens, chunk_size, v.device)
    A = chunk_A(layout, k, g, beta).float()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # the emulation wants it; a server may not
    try:
        X = inverse(fault)(A).double()
    finally:
        torch.set_float32_matmul_precision(precision)
    strength = layout.split(beta)[..., None]
    kb = expand_heads(layout.split(k), H, 1) * strength
    if g is not None:
        kb = kb * layout.split(g).exp()[..., None]
    found = matmul(X, kb), matmul(X, layout.split(v) * strength), X
    w, u, Ai = (layout.join(x, B, T) for x in found)
    return w.to(k.dtype), u.to(v.dtype), Ai.to(k.dtype)
