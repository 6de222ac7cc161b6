"""Sums over pairs of rows for kda_intra_sm90: loads, scaled rows and their products."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from sglang_trinv.kernels.kda_blocks_sm90 import QUARTERS, QUARTERS_LEFT, QUARTERS_RIGHT
from sglang_trinv.kernels.kda_products import KB_SCALE
from sglang_trinv.kernels.kda_tiles_sm90 import (
    COPY_16,
    COPY_32,
    CUT,
    CUT_HALF,
    EXCHANGE,
    PAIR_STEP,
    SLOT_COLUMNS,
    SLOT_ROWS,
    UNIT_STEP,
    block_row,
    decay,
    gather,
    half,
    half_tile,
    scaled,
    slots,
    steps,
    tile,
    times,
    unit_products,
)
from sglang_trinv.kernels.prefill_tiles_sm90 import barrier


@gluon.jit
def row_of(p, s, t, n, o_c):
    """float32 gates of row t of the chunk, of its last row if t is past it, as slots have them."""
    return gl.load(p + gl.expand_dims(gl.minimum(t, n - 1) * s, 1) + gl.expand_dims(o_c, 0))


@gluon.jit
def ask_tile(p, s_x, s, n, layout: gl.constexpr):
    """Ask for 64 channels of 64 rows, past the end 0."""
    o_t = gl.arange(0, 64, gl.SliceLayout(1, layout))
    o_c = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
    m = gl.expand_dims(o_t < n, 1)
    async_copy.async_copy_global_to_shared(s_x, p + gl.expand_dims(o_t * s, 1) + o_c, mask=m)


@gluon.jit
def ask_tiles(q, k, p_g, s_s, s, n):
    """Ask for 64 channels of q, k and the gates."""
    ask_tile(p_g, s_s[2], s, n, COPY_32)
    ask_tile(k, s_s[1], s, n, COPY_16)
    ask_tile(q, s_s[0], s, n, COPY_16)
    async_copy.commit_group()


@gluon.jit
def take_slots(p_g, s_s, s, n, o_c):
    """Eight slots of what ask_tiles has asked for; gates past the end are the last row's."""
    o_b = gl.arange(0, 8, SLOT_ROWS) * 8
    async_copy.wait_group(0)
    x_g, x_k, x_q = slots(s_s[2]), slots(s_s[1]), slots(s_s[0])
    if n < 64:
        b_l = row_of(p_g, s, o_b * 0 + 63, n, o_c)
        y = ()
        for i in gl.static_range(8):
            y = y + (gl.where(gl.expand_dims(o_b < n - i, 1), x_g[i], b_l),)
        x_g = y
    return x_q, x_k, x_g


@gluon.jit
def store_keys(x_k, x_g, s_b, kg, s_kb, s, n, o_c):
    """kg = exp2(g_last - g) k to memory, kb = KB_SCALE beta exp2(g - g_0) k to shared memory."""
    o_b = gl.arange(0, 8, SLOT_ROWS) * 8
    b_0, b_l = gl.ceil(block_row(x_g[0], o_b * 0)), block_row(x_g[7], o_b * 0 + 7)
    o = gl.expand_dims(o_b * s, 1) + gl.expand_dims(o_c, 0)
    kb = ()
    for i in gl.static_range(8):
        m = gl.expand_dims(o_b < n - i, 1)
        b_b = gl.expand_dims(s_b.slice(8 * i, 8).load(SLOT_ROWS), 1) * KB_SCALE
        b_k = x_k[i].to(gl.float32)
        gl.store(kg + i * s + o, (b_k * decay(x_g[i], b_l)).to(kg.dtype.element_ty), mask=m)
        kb = kb + (half(b_k * (decay(x_g[i], b_0) * b_b)),)
    s_kb.store(gather(kb, 0))


@gluon.jit
def cut_slots(x_q, x_k, x_g, LEVEL: gl.constexpr):
    """q and k decayed between their gates and those of the block's middle, LEVEL 8, 16 or 32."""
    o_b = gl.arange(0, 8, SLOT_ROWS)
    b_r = block_row(x_g[0], (o_b // (LEVEL // 4) * 2 + 1) * (LEVEL // 8))
    q, k = (), ()
    for i in gl.static_range(8):
        b_f = half(decay(x_g[i], b_r))
        q, k = q + (times(x_q[i], b_f),), k + (times(x_k[i], b_f),)
    return gather(q, LEVEL), gather(k, LEVEL)


@gluon.jit
def halves(x):
    """Eight slots in float16."""
    y = ()
    for i in gl.static_range(8):
        y = y + (half(x[i]),)
    return y


@gluon.jit
def cut_slot(x, x_g, I: gl.constexpr, LEVEL: gl.constexpr, UPPER: gl.constexpr):
    """Slot I of cut_within."""
    R: gl.constexpr = I // (2 * LEVEL) * (2 * LEVEL) + LEVEL
    if I == R or (UPPER and I < R):
        return x[I]
    else:
        return scaled(x[I], decay(x_g[I], x_g[R]))


@gluon.jit
def cut_within(x, x_g, LEVEL: gl.constexpr, UPPER: gl.constexpr):
    """Slots decayed between their gates and those of the middle of their 2 LEVEL: 1, 2 or 4.

    With UPPER those before the middle, which nobody reads, stay as they are.
    """
    y = ()
    for i in gl.static_range(8):
        y = y + (cut_slot(x, x_g, i, LEVEL, UPPER),)
    return y


@gluon.jit
def kept(LEVEL: gl.constexpr):
    """Which sums of unit_products LEVEL is about, of a diagonal 8 x 8 block; 0: the diagonal's."""
    o_i = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(1, UNIT_STEP)) & 7, 1)
    o_c = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, UNIT_STEP)), 0)
    o_j = (o_c >> 2) * 2 + (o_c & 1)
    if LEVEL == 0:
        return (o_i == o_j) & ((o_c & 2) == 0)
    else:
        return (o_i // (2 * LEVEL) == o_j // (2 * LEVEL)) & (o_i // LEVEL > o_j // LEVEL)


@gluon.jit
def add_level(b_s, s_x, i_q: gl.constexpr, i_k: gl.constexpr, LEVEL: gl.constexpr):
    """Add the products that LEVEL cuts (0: of each row with itself) to the diagonal 8 x 8 blocks.

    Those of rows 0 .. 31 and of rows 32 .. 63.
    """
    y = ()
    for i in gl.static_range(2):
        a_q = steps(s_x, i_q, i, UNIT_STEP)
        a_k = steps(s_x, i_k, i, UNIT_STEP)
        y = y + (gl.where(kept(LEVEL), unit_products(a_q, a_k, a_k, b_s[i]), b_s[i]),)
    return y


@gluon.jit
def joined(b_s):
    """The sums of diagonal 8 x 8 blocks, those of a block of 16 in one warp."""
    b_s = gl.join(b_s[0], b_s[1]).permute((2, 0, 1)).reshape((64, 16))
    return gl.convert_layout(b_s, PAIR_STEP)


@gluon.jit
def add_blocks(b_8, s_x, i_q: gl.constexpr, i_k: gl.constexpr):
    """Add the products that level 8 cuts: rows 32 .. 63 of tiles q and k, rows 0 .. 31 of k."""
    a_q = steps(s_x, i_q, 1, UNIT_STEP)
    a_k = steps(s_x, i_k, 1, UNIT_STEP)
    b_y = steps(s_x, i_k, 0, UNIT_STEP)
    return unit_products(a_q, a_k, b_y, b_8)


@gluon.jit
def quarter_products(s_x, i_q: gl.constexpr, i_k: gl.constexpr, b_Q, b_G):
    """Add the products of rows 32 .. 63 of tiles q and k with rows 0 .. 31 of k."""
    b_y = half_tile(s_x, i_k, 0, CUT_HALF).permute((1, 0)).load(QUARTERS_RIGHT)
    b_Q = mma_v2(half_tile(s_x, i_q, 1, CUT_HALF).load(QUARTERS_LEFT), b_y, b_Q)
    return b_Q, mma_v2(half_tile(s_x, i_k, 1, CUT_HALF).load(QUARTERS_LEFT), b_y, b_G)


@gluon.jit
def products(q, k, gk, s_b, kg, s_s, s_x, s_kb, s, n, to_next, n_next):
    """Sums over pairs of rows, q k and k k; kb to shared memory, kg to memory.

    The first half of the channels was asked for before; the next tile's first half is at the end.

    Returned: those of diagonal 8 x 8 blocks, of the blocks that the cut at 8 parts, and of those
    that the cuts at 16 and at 32 part.
    """
    b_8 = gl.zeros([32, 16], gl.float32, UNIT_STEP)
    b_s = (b_8, b_8)
    Q16 = gl.zeros([32, 32], gl.float32, QUARTERS)
    G16, Q32, G32 = Q16, Q16, Q16
    for i_c in range(2):
        o_c = gl.arange(0, 64, SLOT_COLUMNS) + i_c * 64
        x_q, x_k, x_g = take_slots(gk, s_s, s, n, o_c)
        o, n_o = to_next * 0 + 64, n
        if i_c == 1:
            o, n_o = to_next, n_next
        ask_tiles(q + o, k + o, gk + o, s_s, s, n_o)
        store_keys(x_k, x_g, s_b, kg, s_kb.index(i_c), s, n, o_c)
        x_q, x_k = halves(x_q), halves(x_k)
        tile(s_x, 0, EXCHANGE).store(gather(x_q, 0))
        tile(s_x, 1, EXCHANGE).store(gather(x_k, 0))
        tile(s_x, 2, EXCHANGE).store(gather(cut_within(x_k, x_g, 1, False), 0))
        b_s = add_level(b_s, s_x, 0, 1, 0)
        b_s = add_level(b_s, s_x, 0, 2, 1)
        tile(s_x, 3, EXCHANGE).store(gather(cut_within(x_q, x_g, 2, True), 0))
        tile(s_x, 4, EXCHANGE).store(gather(cut_within(x_k, x_g, 2, False), 0))
        b_s = add_level(b_s, s_x, 3, 4, 2)
        tile(s_x, 5, EXCHANGE).store(gather(cut_within(x_q, x_g, 4, True), 0))
        tile(s_x, 0, EXCHANGE).store(gather(cut_within(x_k, x_g, 4, False), 0))
        b_s = add_level(b_s, s_x, 5, 0, 4)
        c_q, c_k = cut_slots(x_q, x_k, x_g, 8)
        tile(s_x, 1, EXCHANGE).store(c_q)
        tile(s_x, 2, EXCHANGE).store(c_k)
        b_8 = add_blocks(b_8, s_x, 1, 2)
        c_q, c_k = cut_slots(x_q, x_k, x_g, 16)
        tile(s_x, 3, CUT).store(c_q)
        tile(s_x, 4, CUT).store(c_k)
        Q16, G16 = quarter_products(s_x, 3, 4, Q16, G16)
        c_q, c_k = cut_slots(x_q, x_k, x_g, 32)
        tile(s_x, 5, CUT).store(c_q)
        tile(s_x, 0, CUT).store(c_k)
        Q32, G32 = quarter_products(s_x, 5, 0, Q32, G32)
        barrier()
    return joined(b_s), b_8, Q16, G16, Q32, G32
