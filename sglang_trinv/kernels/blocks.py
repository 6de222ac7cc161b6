"""Inverse of a unit lower-triangular matrix out of 16 x 16 blocks: device functions for one warp.

All of them work on ``N = -A`` and on ``E = (I - N)^-1 - I``. The identity is never multiplied: each
product only adds a correction to a float32 term, so tiny entries keep their relative precision
where an fp16 product of them would vanish, and the diagonal stays exactly one. N is rounded once,
before anything else, so that what is computed is the inverse of one nearby matrix: on near-equal
keys the rows of the inverse then cancel as they should (docs/numerics.md#rounded-once).
"""

import triton
import triton.language as tl

from sglang_trinv.kernels.configs import ONE_PART


@triton.constexpr_function
def splits(DOT):
    """Whether the compiler splits both operands in two (x3), or they stay float32."""
    return DOT not in ONE_PART


@triton.jit
def round_once(b_N, DOT: tl.constexpr):
    """N with the 11 significant bits of fp16 and tf32, float32's range kept; unchanged for x3."""
    if DOT == "fp16" or DOT == "tf32":
        b_i = b_N.to(tl.int32, bitcast=True)
        return ((b_i + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return b_N


@triton.jit
def mul_add(a, b, acc, DOT: tl.constexpr, SPLIT_A: tl.constexpr):
    """``acc + a @ b`` in float32.

    DOT is "fp16" (rounded operands), "fp16x2" (one operand rounded, the other in two parts: a with
    SPLIT_A, else b) or an ``input_precision``.
    """
    if DOT == "fp16":
        return tl.dot(a.to(tl.float16), b.to(tl.float16), acc)
    elif DOT == "fp16x2":
        b_high = a.to(tl.float16) if SPLIT_A else b.to(tl.float16)
        b_low = ((a if SPLIT_A else b) - b_high.to(tl.float32)).to(tl.float16)
        if SPLIT_A:
            b = b.to(tl.float16)
            return tl.dot(b_high, b, tl.dot(b_low, b, acc))
        else:
            a = a.to(tl.float16)
            return tl.dot(a, b_high, tl.dot(a, b_low, acc))
    else:
        return tl.dot(a, b, acc, input_precision=DOT)


@triton.jit
def times_inverse(b_N, b_E, acc, DOT: tl.constexpr):
    """``acc + N E``. What is inverted is split, what is already inverted is rounded: the same
    rounded E on both sides of N is a slightly wrong factor, not a wrong inverse
    (docs/numerics.md#fp16x2)."""
    return mul_add(b_N, b_E, acc, DOT, True)


@triton.jit
def inverse_times(b_E, b_Y, acc, DOT: tl.constexpr):
    """``acc + E Y``."""
    return mul_add(b_E, b_Y, acc, DOT, False)


@triton.jit
def merge_pairs(b_N, b_E, r, c, s, DOT: tl.constexpr):
    """One step of inv_16: E of diagonal blocks of 2^(s + 1) rows from those of 2^s rows."""
    m_merge = ((r >> (s + 1)) == (c >> (s + 1))) & ((r >> s) != (c >> s))
    b_M = tl.where(m_merge, b_N, 0.0)
    b_Y = times_inverse(b_M, b_E, b_M, DOT)
    return inverse_times(b_E, b_Y, b_E + b_Y, DOT)


@triton.jit
def inv_16(b_N, DOT: tl.constexpr):
    """E of a strictly lower [16, 16] block.

    Doubles the inverted diagonal blocks, 1 -> 2 -> 4 -> 8 -> 16 (MBH): with M the part of N between
    two neighbours, Y = M + M E and E <- E + Y + E Y. Every intermediate is part of the inverse;
    powers of N never appear (docs/numerics.md#mbh).
    """
    b_N = round_once(b_N, DOT)
    o_i = tl.arange(0, 16)
    r, c = o_i[:, None], o_i[None, :]
    b_E = tl.where((r >> 1) == (c >> 1), b_N, 0.0)
    for s in tl.static_range(1, 4):
        b_E = merge_pairs(b_N, b_E, r, c, s, DOT)
    return b_E


@triton.jit
def inv_16_twice(N00, N11, DOT: tl.constexpr):
    """inv_16 of two blocks, step by step of both.

    In fewer registers than with all steps of all blocks unrolled, where those of products that
    split their operands spill: the compiler keeps both parts.
    """
    N00, N11 = round_once(N00, DOT), round_once(N11, DOT)
    o_i = tl.arange(0, 16)
    r, c = o_i[:, None], o_i[None, :]
    m_pair = (r >> 1) == (c >> 1)
    E00, E11 = tl.where(m_pair, N00, 0.0), tl.where(m_pair, N11, 0.0)
    for s in tl.range(1, 4, num_stages=1):
        E00 = merge_pairs(N00, E00, r, c, s, DOT)
        E11 = merge_pairs(N11, E11, r, c, s, DOT)
    return E00, E11


@triton.jit
def merge(b_E_row, b_Y, DOT: tl.constexpr):
    """(I + E_row) Y: what stands below the diagonal once the row's own block is inverted."""
    return inverse_times(b_E_row, b_Y, b_Y, DOT)


@triton.jit
def merge_32(E00, E11, N10, DOT: tl.constexpr):
    """The block below two inverted ones: X_11 N_10 X_00."""
    N10 = round_once(N10, DOT)
    return merge(E11, times_inverse(N10, E00, N10, DOT), DOT)


@triton.jit
def merge_64(E00, E11, E22, E33, N10, N20, N21, N30, N31, N32, DOT: tl.constexpr):
    """The six blocks below four inverted ones: X_ij = X_ii (N_ij X_jj + ... + N_i,i-1 X_i-1,j)."""
    N20, N21 = round_once(N20, DOT), round_once(N21, DOT)
    N30, N31, N32 = round_once(N30, DOT), round_once(N31, DOT), round_once(N32, DOT)
    X10 = merge_32(E00, E11, N10, DOT)
    X21 = merge(E22, times_inverse(N21, E11, N21, DOT), DOT)
    if not splits(DOT):
        X32 = merge(E33, times_inverse(N32, E22, N32, DOT), DOT)
    Y20 = times_inverse(N21, X10, times_inverse(N20, E00, N20, DOT), DOT)
    X20 = merge(E22, Y20, DOT)
    if splits(DOT):  # later, so that fewer blocks are alive at once
        X32 = merge(E33, times_inverse(N32, E22, N32, DOT), DOT)
    Y31 = times_inverse(N32, X21, times_inverse(N31, E11, N31, DOT), DOT)
    X31 = merge(E33, Y31, DOT)
    Y30 = times_inverse(N31, X10, times_inverse(N30, E00, N30, DOT), DOT)
    X30 = merge(E33, times_inverse(N32, X20, Y30, DOT), DOT)
    return X10, X20, X21, X30, X31, X32


@triton.jit
def merge_halves(E00, E11, E22, E33, N10, N20, N21, N30, N31, N32, DOT: tl.constexpr):
    """merge_64 for products that split their operands: X_lower (N X_upper), 32 rows each.

    Once N is multiplied by the upper half, that is needed no more: fewer parts stay in registers.
    """
    X10 = merge_32(E00, E11, N10, DOT)
    Y20 = times_inverse(N21, X10, times_inverse(N20, E00, N20, DOT), DOT)
    Y21 = times_inverse(N21, E11, N21, DOT)
    Y30 = times_inverse(N31, X10, times_inverse(N30, E00, N30, DOT), DOT)
    Y31 = times_inverse(N31, E11, N31, DOT)
    X32 = merge_32(E22, E33, N32, DOT)
    X30 = inverse_times(X32, Y20, merge(E33, Y30, DOT), DOT)
    X31 = inverse_times(X32, Y21, merge(E33, Y31, DOT), DOT)
    X20, X21 = merge(E22, Y20, DOT), merge(E22, Y21, DOT)
    return X10, X20, X21, X30, X31, X32


@triton.jit
def merge_64_or_halves(E00, E11, E22, E33, N10, N20, N21, N30, N31, N32, DOT: tl.constexpr):
    """merge_64, by halves where operands are split. Not for kkt_solve, where halves spill."""
    if splits(DOT):
        X10, X20, X21, X30, X31, X32 = merge_halves(
            E00, E11, E22, E33, N10, N20, N21, N30, N31, N32, DOT
        )  # fmt: skip
    else:
        X10, X20, X21, X30, X31, X32 = merge_64(
            E00, E11, E22, E33, N10, N20, N21, N30, N31, N32, DOT
        )  # fmt: skip
    return X10, X20, X21, X30, X31, X32


@triton.jit
def add_identity(b_E):
    """X = E + I."""
    o_i = tl.arange(0, 16)
    return b_E + tl.where(o_i[:, None] == o_i[None, :], 1.0, 0.0)
