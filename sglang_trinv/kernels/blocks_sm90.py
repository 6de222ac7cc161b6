"""Inverses for Hopper, in Gluon: blocks of one warp in registers, ``kernels/blocks.py`` by hand.

What limits an inverse is latency, so many warps must fit: what a product needs transposed is
transposed in registers (movmatrix), not in shared memory. Products are in fp16.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

BLOCK = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))  # of a [16, 16] block
ROWS = gl.constexpr(gl.SliceLayout(1, gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])))
COLUMNS = gl.constexpr(gl.SliceLayout(0, gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])))
LEFT = gl.constexpr(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]), 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]), 2))


@gluon.jit
def transposed(b_x):
    """The transpose of a [16, 16] block of 16-bit numbers, in registers."""
    asm: gl.constexpr = (
        "{ movmatrix.sync.aligned.m8n8.trans.b16 $0, $4;"
        " movmatrix.sync.aligned.m8n8.trans.b16 $1, $6;"
        " movmatrix.sync.aligned.m8n8.trans.b16 $2, $5;"
        " movmatrix.sync.aligned.m8n8.trans.b16 $3, $7; }"
    )
    return gl.inline_asm_elementwise(asm, "=r,=r,=r,=r,r,r,r,r", [b_x], b_x.dtype, True, 8)


@gluon.jit
def right(b_x, dtype: gl.constexpr):
    """A block as the right operand of a product."""
    return gl.convert_layout(transposed(b_x.to(dtype)).permute((1, 0)), RIGHT)


@gluon.jit
def left(b_x, dtype: gl.constexpr):
    """A block as the left operand of a product."""
    return gl.convert_layout(b_x.to(dtype), LEFT)


@gluon.jit
def parts(b_x, DOT: gl.constexpr):
    """The fp16 number next to each and, where DOT is "fp16x2", that of what is left."""
    b_high = b_x.to(gl.float16)
    b_low = b_high
    if DOT == "fp16x2":
        b_low = (b_x - b_high.to(gl.float32)).to(gl.float16)
    return b_high, b_low


@gluon.jit
def lefts(b_x, DOT: gl.constexpr):
    b_high, b_low = parts(b_x, DOT)
    return left(b_high, gl.float16), left(b_low, gl.float16)


@gluon.jit
def times_inverse(a_N, b_E, acc, DOT: gl.constexpr):
    """As blocks.times_inverse; a_N are left operands, b_E is a right one."""
    if DOT == "fp16x2":
        acc = mma_v2(a_N[1], b_E, acc)
    return mma_v2(a_N[0], b_E, acc)


@gluon.jit
def inverse_times(a_E, b_Y, acc, DOT: gl.constexpr):
    """As blocks.inverse_times; a_E is a left operand."""
    b_high, b_low = parts(b_Y, DOT)
    if DOT == "fp16x2":
        acc = mma_v2(a_E, right(b_low, gl.float16), acc)
    return mma_v2(a_E, right(b_high, gl.float16), acc)


@gluon.jit
def round_once(b_N, DOT: gl.constexpr):
    """As blocks.round_once."""
    if DOT != "fp16":
        return b_N
    b_i = b_N.to(gl.int32, bitcast=True)
    return ((b_i + 0x1000) & -0x2000).to(gl.float32, bitcast=True)


@gluon.jit
def inv_16(b_N, DOT: gl.constexpr):
    """As blocks.inv_16."""
    r = gl.expand_dims(gl.arange(0, 16, ROWS), 1)
    c = gl.expand_dims(gl.arange(0, 16, COLUMNS), 0)
    b_N = round_once(b_N, DOT)
    b_E = gl.where((r >> 1) == (c >> 1), b_N, 0.0)
    for s in gl.static_range(1, 4):
        b_M = gl.where(((r >> (s + 1)) == (c >> (s + 1))) & ((r >> s) != (c >> s)), b_N, 0.0)
        b_Y = times_inverse(lefts(b_M, DOT), right(b_E, gl.float16), b_M, DOT)
        b_E = inverse_times(left(b_E, gl.float16), b_Y, b_E + b_Y, DOT)
    return b_E


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
def finished(b_E, dtype: gl.constexpr):
    """I + E of a diagonal block, with what rounding a row loses one row below (carry_rounding)."""
    r = gl.expand_dims(gl.arange(0, 16, ROWS), 1)
    c = gl.expand_dims(gl.arange(0, 16, COLUMNS), 0)
    b_lost = b_E - b_E.to(dtype).to(gl.float32)
    b_E = mma_v2(left(gl.where(r == c + 1, 1.0, 0.0), dtype), right(b_lost, dtype), b_E)
    return identity(b_E)


@gluon.jit
def merge_64(
    E00, E11, E22, E33, N10, N20, N21, N30, N31, N32, DOT: gl.constexpr
):  # fmt: skip
    """As blocks.merge_64."""
    f16: gl.constexpr = gl.float16
    N10, N20, N21 = round_once(N10, DOT), round_once(N20, DOT), round_once(N21, DOT)
    N30, N31, N32 = round_once(N30, DOT), round_once(N31, DOT), round_once(N32, DOT)
    a_E11, a_E22, a_E33 = left(E11, f16), left(E22, f16), left(E33, f16)
    b_E00, b_E11, b_E22 = right(E00, f16), right(E11, f16), right(E22, f16)
    a_21, a_31, a_32 = lefts(N21, DOT), lefts(N31, DOT), lefts(N32, DOT)
    b_Y = times_inverse(lefts(N10, DOT), b_E00, N10, DOT)
    X10 = inverse_times(a_E11, b_Y, b_Y, DOT)
    b_Y = times_inverse(a_21, b_E11, N21, DOT)
    X21 = inverse_times(a_E22, b_Y, b_Y, DOT)
    b_Y = times_inverse(a_32, b_E22, N32, DOT)
    X32 = inverse_times(a_E33, b_Y, b_Y, DOT)
    b_X10 = right(X10, f16)
    b_Y = times_inverse(lefts(N20, DOT), b_E00, N20, DOT)
    b_Y = times_inverse(a_21, b_X10, b_Y, DOT)
    X20 = inverse_times(a_E22, b_Y, b_Y, DOT)
    b_Y = times_inverse(a_31, b_E11, N31, DOT)
    b_Y = times_inverse(a_32, right(X21, f16), b_Y, DOT)
    X31 = inverse_times(a_E33, b_Y, b_Y, DOT)
    b_Y = times_inverse(lefts(N30, DOT), b_E00, N30, DOT)
    b_Y = times_inverse(a_31, b_X10, b_Y, DOT)
    b_Y = times_inverse(a_32, right(X20, f16), b_Y, DOT)
    X30 = inverse_times(a_E33, b_Y, b_Y, DOT)
    return X10, X20, X21, X30, X31, X32
