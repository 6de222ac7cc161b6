"""Ways to compute X = (I + A)^-1 for strictly lower triangular A, in emulated precision.

Every function takes ``A`` [..., n, n] in the working dtype, zero on and above the diagonal, n a
power of two, and the precision of its products; X is accumulated in the working dtype. ``u`` is the
unit roundoff of that precision. ``methods.py`` names the variants and counts their products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_trinv.reference.precision import (
    Precision,
    matmul,
    product,
    round_tf32,
    working_dtype,
)


def column_sweep(A: Tensor, precision: Precision) -> Tensor:
    """VCS: forward substitution on all columns of I, one rank-1 update per column of A.

    For k = 0 .. n-2: X <- X - A[:, k] X[k, :], where row k of X is final by then. No matrix
    product, n - 1 dependent vector steps. Componentwise stable: |X' - X| <= n u |X| |I + A| |X|
    (Higham, Accuracy and Stability of Numerical Algorithms, 8.1). Source: arXiv 2605.21325.
    """
    X = _eye(A)
    for k in range(A.shape[-1] - 1):
        X = X - product(A[..., :, k, None], X[..., k, None, :], precision)
    return X


def matrix_column_sweep(A: Tensor, precision: Precision) -> Tensor:
    """MCS: the same sweep as n - 1 elementary matrices, multiplied as matrices.

    X = M_(n-2) .. M_0 with M_k = I - A[:, k] e_k^T. n - 2 products (the first is a copy). Stable as
    VCS, but every product rounds all of X again. Source: arXiv 2605.21325.
    """
    eye = _eye(A)
    X = None
    for k in range(A.shape[-1] - 1):
        M = eye.clone()
        M[..., :, k] -= A[..., :, k]
        X = M if X is None else matmul(M, X, precision)
    return X


def cayley_hamilton(A: Tensor, precision: Precision) -> Tensor:
    """MCH: (I - A)(I + A^2)(I + A^4) .. (I + A^(n/2)), exact because A^n = 0.

    2 log2(n) - 2 products. Unstable: the error is of the order u (I - |A|)^-1, which for equal keys
    is 2^(n-2) u while no entry of X exceeds 1. Source: arXiv 2605.21325.
    """
    X = _eye(A) - A
    power = A
    for _ in range(_log2(A) - 1):
        power = matmul(power, power, precision)
        X = X + matmul(X, power, precision)
    return X


def bunch_hopcroft(A: Tensor, precision: Precision, X: Tensor | None = None, block: int = 1):
    """MBH: double the size of the inverted diagonal blocks until one is left.

    With X the inverse of the diagonal blocks of size b, and A_b the part of A that couples the two
    blocks of each pair: X <- X - X (A_b X). From b = 1, where X = I and the first merge needs no
    product: 2 log2(n) - 2 products. Every factor is a block of A or of X, never a power of A, so
    the error is bounded by the inverse itself (logarithmically stable). Sources: Bunch and Hopcroft
    (Math. Comp. 28, 1974), unrolled as in arXiv 2605.21325.
    """
    n = A.shape[-1]
    if X is None:
        X, block = _eye(A) - torch.where(_couples(A, 1), A, 0.0), 2
    while block < n:
        coupling = torch.where(_couples(A, block), A, 0.0)
        X = X - matmul(X, matmul(coupling, X, precision), precision)
        block *= 2
    return X


def bunch_hopcroft_blocks(A: Tensor, precision: Precision, once: bool = True) -> Tensor:
    """MBH16: MBH as the kernels do it, on N = -A and E = X - I, in blocks of 16.

    Diagonal blocks by doubling, Y = M + M E and E <- E + Y + E Y; the others by block substitution,
    X_ij = (I + E_ii) (N_ij + N_ij E_jj + .. + N_i,i-1 X_i-1,j). Only corrections are products, so
    small entries keep float32's relative precision. With ``once`` N is rounded to 11 bits first
    (fp16 and tf32), so that the result is the inverse of one matrix (docs/numerics.md).
    6 products on the diagonal blocks and one for each N and E above. Stable as MBH.
    """
    N, block = -A, 16
    if once and precision.name in ("fp16", "tf32", "tf32rz"):
        N = round_tf32(N)
    E = torch.where(_couples(N, 1), N, 0.0)
    for size in (2, 4, 8):
        M = torch.where(_couples(N, size), N, 0.0)
        Y = M + matmul(M, E, precision)
        E = E + Y + matmul(E, Y, precision)
    m = A.shape[-1] // block
    N = N.unflatten(-2, (m, block)).unflatten(-1, (m, block)).movedim(-2, -3)
    E = _diagonal_blocks(E, block)
    X = _embed(E + torch.eye(block, dtype=A.dtype, device=A.device), A)
    X = X.unflatten(-2, (m, block)).unflatten(-1, (m, block))
    for distance in range(1, m):
        for j in range(m - distance):
            i = j + distance
            Y = N[..., i, j, :, :] + matmul(N[..., i, j, :, :], E[..., j, :, :], precision)
            for k in range(j + 1, i):
                Y = Y + matmul(N[..., i, k, :, :], X[..., k, :, j, :], precision)
            X[..., i, :, j, :] = Y + matmul(E[..., i, :, :], Y, precision)
    return X.flatten(-2).flatten(-3, -2)


def mixed_recursion(A: Tensor, precision: Precision, block: int) -> Tensor:
    """MXR: MCH on the diagonal blocks of this size, then MBH merges.

    2 log2(n) products as MBH, but blocks of 16 make better use of the matrix unit. Unstable for
    blocks of 16: MCH's growth inside a block is 2^14 for equal keys, more than fp16 and bf16 have
    digits. Blocks of 4 are harmless. Source: arXiv 2605.21325 (block 16).
    """
    X = _embed(cayley_hamilton(_diagonal_blocks(A, block), precision), A)
    return bunch_hopcroft(A, precision, X, block)


def newton_schulz(
    A: Tensor, precision: Precision, rounds: int | None = None, scaled: bool = False
) -> Tensor:
    """NS: X <- X (2 I - (I + A) X), from X = I, or from X = I / (2 n) as in arXiv 2605.21325.

    From I the residual after r rounds is A^(2^r): exact for 2^r >= n, else truncated; the first
    round needs no product, 2 r - 2 in all. Unstable as MCH, through the same powers of A; rounds
    beyond log2(n) correct themselves only while the error is below 1. From I / (2 n), by default
    with 2 log2(n) + 2 rounds, no power of A appears alone: measured as accurate as MBH on inputs
    inside the bound of ``bounds.condition_bound``, at more than twice the products; outside it the
    fixed number of rounds does not suffice.
    """
    eye = _eye(A)
    rounds = 2 * _log2(A) + 2 if rounds is None else rounds
    L = eye + A
    X = eye / (2 * A.shape[-1]) if scaled else eye - A
    for _ in range(rounds if scaled else rounds - 1):
        X = matmul(X, 2 * eye - matmul(L, X, precision), precision)
    return X


def truncated_neumann(A: Tensor, precision: Precision, order: int, corrections: int = 1) -> Tensor:
    """Neumann: I - A + A^2 - .. up to A^order, then X <- X + X (I - (I + A) X).

    order - 1 products (Horner) and 2 for each correction. The residual is A^(order + 1), squared by
    each correction; exact for (order + 1) 2^corrections >= n, otherwise an approximation that needs
    small A. After arXiv 2606.06034; orders and masks of that paper are not reproduced.
    """
    eye = _eye(A)
    X = eye - A
    for _ in range(order - 1):
        X = eye - matmul(A, X, precision)
    for _ in range(corrections):
        residual = (eye - X) - matmul(A, X, precision)
        X = X + matmul(X, residual, precision)
    return X


def substitute_then_double(A: Tensor, precision: Precision, block: int) -> Tensor:
    """FS + MBH: float32 substitution on diagonal blocks of this size, then MBH merges.

    Stable; block - 1 vector steps before the products. FlashInfer on SM90: block 8, fp16 merges
    (collective_inverse_hmma).
    """
    X = _embed(_substitute(_diagonal_blocks(A, block)), A)
    return bunch_hopcroft(A, precision, X, block)


def substitute_then_rows(A: Tensor, precision: Precision, block: int) -> Tensor:
    """FS + rows: float32 substitution on diagonal blocks, then block forward substitution.

    X_ij = -X_ii (A_ij X_jj + .. + A_i,i-1 X_i-1,j), next to the diagonal -(X_ii A_ij) X_jj.
    Stable. SGLang: block 16, tf32 merges (chunk_fwd.py), after flash-linear-attention.
    """
    m = A.shape[-1] // block
    A_blocks = A.unflatten(-2, (m, block)).unflatten(-1, (m, block))
    D = _substitute(_diagonal_blocks(A, block))
    X = torch.zeros_like(A_blocks)
    for i in range(m):
        X[..., i, :, i, :] = D[..., i, :, :]
    for distance in range(1, m):
        for j in range(m - distance):
            i = j + distance
            if distance == 1:
                left = matmul(D[..., i, :, :], A_blocks[..., i, :, j, :], precision)
                X[..., i, :, j, :] = -matmul(left, D[..., j, :, :], precision)
            else:
                right = sum(
                    matmul(A_blocks[..., i, :, k, :], X[..., k, :, j, :], precision)
                    for k in range(j, i)
                )
                X[..., i, :, j, :] = -matmul(D[..., i, :, :], right, precision)
    return X.flatten(-2).flatten(-3, -2)


def _substitute(A: Tensor) -> Tensor:
    """Column sweep without rounding: float32, or float64 if A is."""
    return column_sweep(A, working_dtype(A))


def _log2(A: Tensor) -> int:
    return A.shape[-1].bit_length() - 1


def _eye(A: Tensor) -> Tensor:
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A).clone()


def _couples(A: Tensor, block: int) -> Tensor:
    """Where the row lies in the second and the column in the first block of one pair."""
    number = torch.arange(A.shape[-1], device=A.device) // block
    row, column = number[:, None], number[None, :]
    return (row // 2 == column // 2) & (row > column)


def _diagonal_blocks(A: Tensor, block: int) -> Tensor:
    """[..., n, n] -> [..., n / block, block, block]."""
    m = A.shape[-1] // block
    blocks = A.unflatten(-2, (m, block)).unflatten(-1, (m, block))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _embed(blocks: Tensor, A: Tensor) -> Tensor:
    """Block diagonal matrix of A's shape with these blocks."""
    m, block = blocks.shape[-3:-1]
    X = blocks.new_zeros(*blocks.shape[:-3], m, block, m, block)
    X.diagonal(dim1=-4, dim2=-2).copy_(blocks.movedim(-3, -1))
    return X.view(A.shape)
