"""Inverses for Hopper, in Gluon: blocks of one warp in registers, ``kernels/blocks.py`` by hand.

What limits an inverse is latency, and transposes (movmatrix) are what it waits for most: so no
product waits for the transpose of another's result but once a step. Products are in fp16.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from sglang_trinv.kernels.quarters_sm90 import (
    BLOCK,
    add_parts,
    add_product,
    block,
    inv_8,
    parts,
    quarters,
    transposed,
    transposed_parts,
)

ROWS = gl.constexpr(gl.SliceLayout(1, BLOCK.value))
COLUMNS = gl.constexpr(gl.SliceLayout(0, BLOCK.value))
LEFT = gl.constexpr(gl.DotOperandLayout(0, BLOCK.value, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, BLOCK.value, 2))


@gluon.jit
def left(b_x, dtype: gl.constexpr):
    """A block as the left operand of a product."""
    return gl.convert_layout(b_x.to(dtype), LEFT)


@gluon.jit
def right(t_x):
    """A right operand of a product from its transpose, a block or a left operand."""
    return gl.convert_layout(t_x.permute((1, 0)), RIGHT)


@gluon.jit
def right_lower(b_x, dtype: gl.constexpr):
    """A lower triangular block as the right operand of a product."""
    b_00, b_10, b_01, b_11 = quarters(b_x.to(dtype))
    t_00, t_10, t_11 = transposed(b_00), transposed(b_10), transposed(b_11)
    return right(block(t_00, gl.zeros_like(t_00), t_10, t_11))


@gluon.jit
def right_full(b_x):
    """A block of fp16 numbers as the right operand of a product."""
    b_00, b_10, b_01, b_11 = quarters(b_x)
    return right(block(transposed(b_00), transposed(b_01), transposed(b_10), transposed(b_11)))


@gluon.jit
def right_parts(b_x, DOT: gl.constexpr):
    """A block as the right operand of ``times``."""
    b_high, b_low = parts(b_x, DOT)
    return right_full(b_high), right_full(b_low)


@gluon.jit
def times(a_X, b_N, acc, DOT: gl.constexpr):
    """acc + X N: a_X is a left operand, b_N the parts of a right one."""
    if DOT == "fp16x2":
        acc = mma_v2(a_X, b_N[1], acc)
    return mma_v2(a_X, b_N[0], acc)


@gluon.jit
def times_inverse(b_Z, b_E, DOT: gl.constexpr):
    """Z (I + E): b_E is a right operand."""
    b_high, b_low = parts(b_Z, DOT)
    acc = b_Z
    if DOT == "fp16x2":
        acc = mma_v2(left(b_low, gl.float16), b_E, acc)
    return mma_v2(left(b_high, gl.float16), b_E, acc)


@gluon.jit
def round_once(b_N, DOT: gl.constexpr):
    """As blocks.round_once."""
    if DOT != "fp16":
        return b_N
    b_i = b_N.to(gl.int32, bitcast=True)
    return ((b_i + 0x1000) & -0x2000).to(gl.float32, bitcast=True)


@gluon.jit
def inv_16(b_M, b_N, DOT: gl.constexpr):
    """E = X - I of two lower triangular blocks by MBH, and both as right operands.

    Quarters on the diagonal first, two of them in one product.
    """
    f16: gl.constexpr = gl.float16
    b_M, b_N = round_once(b_M, DOT), round_once(b_N, DOT)
    M00, M10, M01, M11 = quarters(b_M)
    N00, N10, N01, N11 = quarters(b_N)
    E00, E11 = inv_8(M00, transposed_parts(M00, DOT), M11, transposed_parts(M11, DOT), DOT)
    F00, F11 = inv_8(N00, transposed_parts(N00, DOT), N11, transposed_parts(N11, DOT), DOT)
    t_E00, t_F00 = transposed(E00.to(f16)), transposed(F00.to(f16))
    t_M, t_N = transposed_parts(M10, DOT), transposed_parts(N10, DOT)
    b_e, b_f = E11.to(f16), F11.to(f16)
    b_Y, b_Z = add_parts(M10, N10, b_e, b_f, t_M, t_N, DOT)
    E10, F10 = add_product(b_Y, b_Z, b_Y, b_Z, t_E00, t_F00, DOT)
    b_0 = gl.zeros_like(E00)
    t_0 = gl.zeros_like(t_E00)
    t_E = block(t_E00, t_0, transposed(E10.to(f16)), transposed(b_e))
    t_F = block(t_F00, t_0, transposed(F10.to(f16)), transposed(b_f))
    return block(E00, E10, b_0, E11), right(t_E), block(F00, F10, b_0, F11), right(t_F)


@gluon.jit
def identity(b_E):
    """I + E of a diagonal block."""
    r = gl.expand_dims(gl.arange(0, 16, ROWS), 1)
    c = gl.expand_dims(gl.arange(0, 16, COLUMNS), 0)
    return b_E + gl.where(r == c, 1.0, 0.0)


@gluon.jit
def with_identity(X):
    """What inverse_blocks returns with I added on the diagonal."""
    return (
        identity(X[0]), X[1], identity(X[2]), X[3], X[4], identity(X[5]),
        X[6], X[7], X[8], identity(X[9]),
    )  # fmt: skip


@gluon.jit
def rounded(b_x, dtype: gl.constexpr):
    """The 16-bit number next to each, as float32; two at once, which Triton does not."""
    asm: gl.constexpr = (
        "{ .reg .b32 x; cvt.rn.bf16x2.f32 x, $3, $2; shl.b32 $0, x, 16;"
        " and.b32 $1, x, 0xffff0000; }"
    )
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(asm, "=r,=r,r,r", [b_x], gl.float32, True, 2)
    else:
        return b_x.to(dtype).to(gl.float32)


@gluon.jit
def finished(b_E, dtype: gl.constexpr):
    """I + E of a diagonal block, with what rounding a row loses one row below (carry_rounding)."""
    r = gl.expand_dims(gl.arange(0, 16, ROWS), 1)
    c = gl.expand_dims(gl.arange(0, 16, COLUMNS), 0)
    b_lost = b_E - rounded(b_E, dtype)
    below = left(gl.where(r == c + 1, 1.0, 0.0), dtype)
    return identity(mma_v2(below, right_lower(b_lost, dtype), b_E))


@gluon.jit
def merge_64(
    E11, E22, E33, b_E00, b_E11, b_E22, N10, N20, N21, N30, N31, N32, DOT: gl.constexpr
):  # fmt: skip
    """As blocks.merge_64, from the left: Z = (I + E_ii) N_ij + sum X_ik N_kj, X_ij = Z (I + E_jj).

    So no product has to wait for the transpose of another's result. b_E are right operands.
    """
    f16: gl.constexpr = gl.float16
    N10, N20, N21 = round_once(N10, DOT), round_once(N20, DOT), round_once(N21, DOT)
    N30, N31, N32 = round_once(N30, DOT), round_once(N31, DOT), round_once(N32, DOT)
    a_E11, a_E22, a_E33 = left(E11, f16), left(E22, f16), left(E33, f16)
    b_10, b_21 = right_parts(N10, DOT), right_parts(N21, DOT)
    X10 = times_inverse(times(a_E11, b_10, N10, DOT), b_E00, DOT)
    X21 = times_inverse(times(a_E22, b_21, N21, DOT), b_E11, DOT)
    X32 = times_inverse(times(a_E33, right_parts(N32, DOT), N32, DOT), b_E22, DOT)
    b_Z = times(a_E22, right_parts(N20, DOT), N20, DOT)
    X20 = times_inverse(times(left(X21, f16), b_10, b_Z, DOT), b_E00, DOT)
    b_Z = times(a_E33, right_parts(N31, DOT), N31, DOT)
    X31 = times_inverse(times(left(X32, f16), b_21, b_Z, DOT), b_E11, DOT)
    b_Z = times(a_E33, right_parts(N30, DOT), N30, DOT)
    b_Z = times(left(X32, f16), right_parts(N20, DOT), b_Z, DOT)
    X30 = times_inverse(times(left(X31, f16), b_10, b_Z, DOT), b_E00, DOT)
    return X10, X20, X21, X30, X31, X32
