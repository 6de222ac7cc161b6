"""The inverse of KDA's chunk for Hopper, in Gluon, by four warps, and its products with tiles."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from sglang_trinv.kernels.blocks_sm90 import round_once
from sglang_trinv.kernels.quarters_sm90 import transposed

# Four blocks [16, 16] one below the other, a warp each.
STACK = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
STACK_ROWS = gl.constexpr(gl.SliceLayout(1, STACK.value))
STACK_COLUMNS = gl.constexpr(gl.SliceLayout(0, STACK.value))
# One block whose columns, 8 at once, the warps have in turns.
WIDE = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8]))
WIDE_COLUMNS = gl.constexpr(gl.SliceLayout(0, WIDE.value))
WIDE_LEFT = gl.constexpr(gl.DotOperandLayout(0, WIDE.value, 2))
WIDE_RIGHT = gl.constexpr(gl.DotOperandLayout(1, WIDE.value, 2))
# [32, 32], a quarter a warp.
QUARTERS = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [2, 2], [16, 8]))
QUARTERS_ROWS = gl.constexpr(gl.SliceLayout(1, QUARTERS.value))
QUARTERS_LEFT = gl.constexpr(gl.DotOperandLayout(0, QUARTERS.value, 2))
QUARTERS_RIGHT = gl.constexpr(gl.DotOperandLayout(1, QUARTERS.value, 2))
BLOCKS = gl.constexpr(gl.SwizzledSharedLayout(8, 4, 2, [1, 0]))  # rows of 32 bytes
SUMS = gl.constexpr(gl.SwizzledSharedLayout(8, 2, 2, [1, 0]))  # rows of 64 bytes


@gluon.jit
def stack_mma(b_x, b_y, acc):
    """acc + x y, block by block; y transposed by quarters."""
    asm: gl.constexpr = (
        "{ mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        " {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$16, $17, $18, $19};"
        " mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        " {$4, $5, $6, $7}, {$8, $9, $10, $11}, {$14, $15}, {$20, $21, $22, $23}; }"
    )
    return gl.inline_asm_elementwise(
        asm, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [b_x.to(gl.float16), b_y, acc], gl.float32, True, 8,
    )  # fmt: skip


@gluon.jit
def inv_stack(b_N):
    """As blocks.inv_16, of four blocks."""
    r = gl.expand_dims(gl.arange(0, 64, STACK_ROWS) & 15, 1)
    c = gl.expand_dims(gl.arange(0, 16, STACK_COLUMNS), 0)
    b_N = round_once(b_N, "fp16")
    b_E = gl.where((r >> 1) == (c >> 1), b_N, 0.0)
    for s in gl.static_range(1, 4):
        b_M = gl.where(((r >> (s + 1)) == (c >> (s + 1))) & ((r >> s) != (c >> s)), b_N, 0.0)
        b_Y = stack_mma(b_M, transposed(b_E.to(gl.float16)), b_M)
        b_E = stack_mma(b_E, transposed(b_Y.to(gl.float16)), b_E + b_Y)
    return b_E


@gluon.jit
def block(s, I: gl.constexpr):
    """Block I of a stack in shared memory."""
    return s.slice(16 * I, 16, 0)


@gluon.jit
def wide_right(b_x):
    """A block as a right operand, in registers."""
    b_x = (
        transposed(b_x.to(gl.float16)).reshape((2, 8, 2, 8)).permute((0, 3, 2, 1)).reshape((16, 16))
    )
    return gl.convert_layout(b_x, WIDE_RIGHT)


@gluon.jit
def left_block(s_X, I: gl.constexpr, J: gl.constexpr):
    """X_IJ, a left operand, of a stack X00 .. X33, X10, -, -, X32, X20, X21, X30, X31."""
    if I == J:
        return block(s_X, I).load(WIDE_LEFT)
    elif J == 2:
        return block(s_X, 7).load(WIDE_LEFT)
    elif I == 1:
        return block(s_X, 4).load(WIDE_LEFT)
    else:
        return block(s_X, 2 * I + J + 4).load(WIDE_LEFT)


@gluon.jit
def merge(s_E, b_Y, I: gl.constexpr):
    """(I + E_II) Y."""
    return mma_v2(block(s_E, I).load(WIDE_LEFT), wide_right(b_Y), b_Y)


@gluon.jit
def stacked(b_x):
    """The four blocks of a tile [32, 32], row by row, one below the other."""
    return b_x.reshape((2, 16, 2, 16)).permute((0, 2, 1, 3)).reshape((64, 16))


@gluon.jit
def part(s_N, I: gl.constexpr):
    """A block of N, float32 and as a left operand."""
    return block(s_N, I).load(WIDE), block(s_N, I).load(WIDE_LEFT).to(gl.float16)


@gluon.jit
def right(s_E, I: gl.constexpr):
    return block(s_E, I).load(WIDE_RIGHT)


@gluon.jit
def merge_stack(s_E, s_N16, s_N32):
    """As blocks.merge_64: X10, X32, X20, X21, X30, X31.

    s_E: a stack of E00 .. E33, and room behind, see left_block. s_N16: N10 first, N32 last; s_N32:
    N20, N21, N30, N31.
    """
    N10, a_10 = part(s_N16, 0)
    N32, a_32 = part(s_N16, 3)
    X10 = merge(s_E, mma_v2(a_10, right(s_E, 0), N10), 1)
    X32 = merge(s_E, mma_v2(a_32, right(s_E, 2), N32), 3)
    b_X10 = wide_right(X10)
    block(s_E, 7).store(X32.to(gl.float16))
    b_E0, b_E1 = right(s_E, 0), right(s_E, 1)
    N20, a_20 = part(s_N32, 0)
    N21, a_21 = part(s_N32, 1)
    N30, a_30 = part(s_N32, 2)
    N31, a_31 = part(s_N32, 3)
    Y20 = mma_v2(a_21, b_X10, mma_v2(a_20, b_E0, N20))
    Y30 = mma_v2(a_31, b_X10, mma_v2(a_30, b_E0, N30))
    Y21, Y31 = mma_v2(a_21, b_E1, N21), mma_v2(a_31, b_E1, N31)
    b_20, b_21 = wide_right(Y20), wide_right(Y21)
    a_E2, a_E3 = block(s_E, 2).load(WIDE_LEFT), block(s_E, 3).load(WIDE_LEFT)
    a_X32 = block(s_E, 7).load(WIDE_LEFT)
    X20, X21 = mma_v2(a_E2, b_20, Y20), mma_v2(a_E2, b_21, Y21)
    X30 = mma_v2(a_X32, b_20, mma_v2(a_E3, wide_right(Y30), Y30))
    X31 = mma_v2(a_X32, b_21, mma_v2(a_E3, wide_right(Y31), Y31))
    return X10, X32, X20, X21, X30, X31
