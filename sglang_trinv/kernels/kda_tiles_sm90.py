"""Layouts, factors and small products of the KDA intra-chunk step for Hopper, in Gluon.

A program of four warps has 64 tokens of one head and 64 channels at once. A thread owns 4 channels
of 8 consecutive tokens, its slots: the cuts at 4, 2 and 1 then lie within a thread, which has the
gates on both sides. Scaled rows are exchanged in shared memory, from where each warp takes those it
multiplies.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# A slot: [8 blocks of 8 tokens, 64 channels].
SLOT = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [1, 4], [1, 0]))
SLOT_ROWS = gl.constexpr(gl.SliceLayout(1, SLOT.value))
SLOT_COLUMNS = gl.constexpr(gl.SliceLayout(0, SLOT.value))
# [64, 64] and [32, 64] in shared memory: 128 bytes a row, pieces of 16 bytes exchanged so that few
# stores of slots meet in the same banks, and no loads: those of 16 bytes a thread (EXCHANGE), by
# ldmatrix (CUT, KEYS) and of slots (COPY). Each bit of the slot's number that takes part costs
# addresses, that is registers; ldmatrix wants all three.
_ROW = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32]]
_EXCHANGE = [*_ROW, [1, 32], [2, 0], [4, 0], [8, 16], [16, 32]]
_CUT = [*_ROW, [1, 8], [2, 16], [4, 32], [8, 16], [16, 32]]
EXCHANGE = gl.constexpr(gl.SharedLinearLayout([*_EXCHANGE, [32, 32]]))
EXCHANGE_HALF = gl.constexpr(gl.SharedLinearLayout(_EXCHANGE))
CUT = gl.constexpr(gl.SharedLinearLayout([*_CUT, [32, 0]]))
CUT_HALF = gl.constexpr(gl.SharedLinearLayout(_CUT))
TILES = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))  # for ldmatrix alone
KEYS = gl.constexpr(
    gl.SharedLinearLayout([*_ROW, [1, 8], [2, 16], [4, 32], [8, 16], [16, 0], [32, 0]])
)
# Tiles come in by rows and are taken as eight slots a thread.
COPY = gl.constexpr(
    gl.SharedLinearLayout([*_ROW, [1, 0], [2, 0], [4, 0], [8, 16], [16, 32], [32, 0]])
)
COPY_16 = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
COPY_32 = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0]))
SLOTS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        [[0, 4], [0, 8], [8, 0], [16, 0], [32, 0]], [[0, 16], [0, 32]], [], [64, 64],
    )
)  # fmt: skip
BETAS = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
# Operands of unit_products: a unit of 8 rows a warp, a thread has 16 channels of one of them.
UNITS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [], [32, 64],
    )
)  # fmt: skip
# The 16 channels of one mma, and its sums (see unit_step), of two units a warp and of one.
PAIR_STEP = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 16],
    )
)  # fmt: skip
UNIT_STEP = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2]],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [], [32, 16],
    )
)  # fmt: skip


@gluon.jit
def decay(b_g, b_r):
    """exp2(-|g - r|); what underflows float32 is 0."""
    asm: gl.constexpr = (
        "{ .reg .f32 d; sub.f32 d, $1, $2; abs.f32 d, d; neg.f32 d, d; ex2.approx.ftz.f32 $0, d; }"
    )
    return gl.inline_asm_elementwise(asm, "=r,r,r", [b_g, b_r], gl.float32, True, 1)


@gluon.jit
def times(b_x, b_f):
    """Product of float16 tensors, two numbers an instruction."""
    return gl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [b_x, b_f], gl.float16, True, 2
    )


@gluon.jit
def half(b_x):
    """Two numbers an instruction."""
    if b_x.dtype == gl.float32:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [b_x], gl.float16, True, 2
        )
    else:
        return b_x.to(gl.float16)


@gluon.jit
def scaled(b_x, b_f):
    """A float16 slot times a float32 factor, rounded to float16."""
    return times(b_x, half(b_f))


@gluon.jit
def block_row(b_g, o_b):
    """Rows o_b of a slot, all of its channels."""
    return gl.gather(b_g, gl.expand_dims(o_b, 1) + gl.full([8, 64], 0, gl.int32, SLOT), 0)


@gluon.jit
def tile(s_x, i: gl.constexpr, layout: gl.constexpr):
    """One of several tiles [64, 64] in shared memory."""
    return s_x[i]._reinterpret(gl.float16, [64, 64], layout)


@gluon.jit
def half_tile(s_x, i: gl.constexpr, UPPER: gl.constexpr, layout: gl.constexpr):
    """Rows 0 .. 31 or 32 .. 63 of one of several tiles."""
    s_y = s_x[i]._reinterpret(gl.float16, [2, 32, 64], TILES)
    return s_y.index(UPPER)._reinterpret(gl.float16, [32, 64], layout)


@gluon.jit
def unit_step(b_q, b_k, b_y, acc):
    """One mma of 16 channels: 8 rows of q and 8 of k times 8 of y, a unit each.

    In the sums' columns 4 c + 2 x + e lie products with row 2 c + e of y: of q (x 0) or k (x 1).
    """
    asm: gl.constexpr = (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        " {$0, $1, $2, $3}, {$4, $6, $5, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    return gl.inline_asm_elementwise(
        asm, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [b_q, b_k, b_y, acc], gl.float32, True, 4
    )


@gluon.jit
def steps(s_x, i: gl.constexpr, UPPER: gl.constexpr, layout: gl.constexpr):
    """Half of tile i as four tensors of 16 channels, a quarter of what each thread has."""
    b_x = half_tile(s_x, i, UPPER, EXCHANGE_HALF).load(UNITS)
    R: gl.constexpr = b_x.shape[0]
    b_x = b_x.reshape((R, 2, 4, 2, 4)).permute((0, 2, 4, 1, 3))
    b_02, b_13 = gl.split(b_x)
    if UPPER:  # EXCHANGE has its channels 32 .. 63 first
        b_2, b_0 = gl.split(b_02)
        b_3, b_1 = gl.split(b_13)
    else:
        b_0, b_2 = gl.split(b_02)
        b_1, b_3 = gl.split(b_13)
    return (
        gl.convert_layout(b_0.reshape((R, 16)), layout),
        gl.convert_layout(b_1.reshape((R, 16)), layout),
        gl.convert_layout(b_2.reshape((R, 16)), layout),
        gl.convert_layout(b_3.reshape((R, 16)), layout),
    )


@gluon.jit
def unit_products(q, k, y, acc):
    """Add the products of each unit's rows of q and k with its rows of y, over 64 channels."""
    for i in gl.static_range(4):
        acc = unit_step(q[i], k[i], y[i], acc)
    return acc


@gluon.jit
def gather(x, LEVEL: gl.constexpr):
    """Eight slots as [64, 64], rows in the order of a level.

    The bit of the token's number that is worth LEVEL (8, 16 or 32) becomes the highest of the
    row's number: above and below the cut are halves of the tile. LEVEL 0 and 32: rows as they are.
    """
    b_0, b_1 = gl.join(x[0], x[4]), gl.join(x[1], x[5])
    b_2, b_3 = gl.join(x[2], x[6]), gl.join(x[3], x[7])
    b_x = gl.join(gl.join(b_0, b_2), gl.join(b_1, b_3))  # [block, channel, s2, s1, s0]
    b_x = b_x.reshape((2, 2, 2, 64, 2, 2, 2))  # b2, b1, b0, channel, s2, s1, s0
    if LEVEL == 16:
        b_x = b_x.permute((1, 0, 2, 4, 5, 6, 3))
    elif LEVEL == 8:
        b_x = b_x.permute((2, 0, 1, 4, 5, 6, 3))
    else:
        b_x = b_x.permute((0, 1, 2, 4, 5, 6, 3))
    return b_x.reshape((64, 64))


@gluon.jit
def slots(s_x):
    """A tile as eight slots."""
    b_x = s_x.load(SLOTS).reshape((8, 2, 2, 2, 64)).permute((0, 4, 3, 2, 1))
    b_0, b_4 = gl.split(b_x)
    b_0, b_2 = gl.split(b_0)
    b_4, b_6 = gl.split(b_4)
    x, b_x = (), (b_0, b_2, b_4, b_6)
    for i in gl.static_range(4):
        y = gl.split(b_x[i])
        x = x + (gl.convert_layout(y[0], SLOT), gl.convert_layout(y[1], SLOT))
    return x


@gluon.jit
def split_products(acc):
    """The sums of unit_products [8 n, 16] as those of q and of k: [n, 8, 4, 2]."""
    N: gl.constexpr = acc.shape[0] // 8
    return gl.split(acc.reshape((N, 8, 4, 2, 2)).permute((0, 1, 2, 4, 3)))


@gluon.jit
def diagonal_blocks(b_s, b_8, layout: gl.constexpr):
    """Four [16, 16] blocks one below the other out of those of 8 x 8; zeros above."""
    b_0, b_3 = gl.split(b_s.reshape((4, 2, 8, 4, 2)).permute((0, 2, 3, 4, 1)))
    b_0, b_3 = gl.convert_layout(b_0, b_8.type.layout), gl.convert_layout(b_3, b_8.type.layout)
    b_x = gl.join(gl.join(b_0, gl.zeros_like(b_8)), gl.join(b_8, b_3))  # .., half column, half row
    return gl.convert_layout(b_x.permute((0, 5, 1, 4, 2, 3)).reshape((64, 16)), layout)


@gluon.jit
def ask_betas(beta, row, n, i_h, H: gl.constexpr):
    """Write strengths of a tile, 0 past the end; each warp has all of them."""
    o_t = gl.arange(0, 64, BETAS)
    return gl.load(beta + (row + o_t).to(gl.int64) * H + i_h, mask=o_t < n, other=0.0)


@gluon.jit
def share_betas(b_b):
    """Write strengths in shared memory: as they are, slot by slot, and in the order of level 16."""
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    b_s = b_b.reshape((8, 8)).permute((1, 0)).reshape((64,))
    b_16 = b_b.reshape((2, 2, 16)).permute((1, 0, 2)).reshape((64,))
    return (
        gl.allocate_shared_memory(gl.float32, [64], line, b_b),
        gl.allocate_shared_memory(gl.float32, [64], line, b_s),
        gl.allocate_shared_memory(gl.float32, [64], line, b_16),
    )


@gluon.jit
def betas(s_b, layout: gl.constexpr, axis: gl.constexpr):
    return gl.expand_dims(s_b.load(layout), axis)
