"""Kimi Delta Attention's intra-chunk step for Hopper: kda_intra.kda_intra_kernel in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from sglang_trinv.kernels.blocks_sm90 import round_once
from sglang_trinv.kernels.chunk_sm90 import locate_tile
from sglang_trinv.kernels.kda_blocks_sm90 import (
    BLOCKS,
    QUARTERS_ROWS,
    STACK,
    STACK_COLUMNS,
    STACK_ROWS,
    SUMS,
    WIDE,
    WIDE_COLUMNS,
    WIDE_LEFT,
    WIDE_RIGHT,
    block,
    inv_stack,
    left_block,
    merge_stack,
    stacked,
)
from sglang_trinv.kernels.kda_gram_sm90 import ask_tiles, products
from sglang_trinv.kernels.kda_products import KB_SCALE
from sglang_trinv.kernels.kda_tiles_sm90 import (
    COPY,
    KEYS,
    TILES,
    ask_betas,
    betas,
    decay,
    diagonal_blocks,
    share_betas,
    split_products,
)
from sglang_trinv.kernels.prefill_tiles_sm90 import barrier, store_rows

# 16 bytes a thread: [64, 64] and [64, 16] or [32, 16] tiles of 16-bit results on their way out.
OUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
OUT_BLOCK = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))


@gluon.jit
def ask_values(v, s_v, s, n):
    """Ask for v's tile; rows past the end are 0."""
    o_t, o_c = gl.arange(0, 64, gl.SliceLayout(1, OUT)), gl.arange(0, 64, gl.SliceLayout(0, OUT))
    o = gl.expand_dims(o_t * s, 1) + gl.expand_dims(o_c, 0)
    m = (gl.expand_dims(o_t, 1) < n) & (gl.expand_dims(o_c, 0) >= 0)
    async_copy.async_copy_global_to_shared(s_v.index(0), v + o, mask=m)
    async_copy.async_copy_global_to_shared(s_v.index(1), v + o + 64, mask=m)
    async_copy.commit_group()


@gluon.jit
def put_stack(p, s, s_y, n, WHERE: gl.constexpr):
    """Store a stack of four [16, 16] blocks: those on the diagonal, (1, 0) and (3, 2) as the first
    and the last, or (2, 0), (2, 1), (3, 0) and (3, 1), by WHERE.
    """
    o_r = gl.arange(0, 64, gl.SliceLayout(1, OUT_BLOCK))
    o_c = gl.arange(0, 16, gl.SliceLayout(0, OUT_BLOCK))
    i, o_t = o_r >> 5, o_r
    c, m = (o_r >> 4) * 16, o_r < 64  # products: their divisors are known
    if WHERE == 1:
        o_t, c, m = i * 32 + 16 + (o_r & 15), i * 32, i == ((o_r >> 4) & 1)
    if WHERE == 2:
        o_t, c = i * 16 + 32 + (o_r & 15), ((o_r >> 4) & 1) * 16
    m = gl.expand_dims((o_t < n) & m, 1) & (gl.expand_dims(o_c, 0) >= 0)
    p_y = p + gl.expand_dims(o_t * s + c, 1) + gl.expand_dims(o_c, 0)
    gl.store(p_y, s_y.load(OUT_BLOCK), mask=m)


@gluon.jit
def put_zeros(p, s, t, c, n, R: gl.constexpr, C: gl.constexpr):
    layout: gl.constexpr = OUT_BLOCK
    o_t = gl.arange(0, R, gl.SliceLayout(1, layout)) + t
    o_c = gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, layout)) + c, 0)
    m = (gl.expand_dims(o_t, 1) < n) & (o_c >= 0)
    gl.store(p + gl.expand_dims(o_t * s, 1) + o_c, gl.zeros([R, C], p.dtype.element_ty, layout),
             mask=m)  # fmt: skip


@gluon.jit
def put_zeros_above(p, s, n):
    """The blocks above the diagonal."""
    put_zeros(p, s, 0, 16, n, 16, 16)
    put_zeros(p, s, 32, 48, n, 16, 16)
    put_zeros(p, s, 0, 32, n, 32, 32)


@gluon.jit
def put_scores(Q_d, Q16, Q32, p, s, scale, n, dtype: gl.constexpr):
    """Store Aqk."""
    s_d = gl.allocate_shared_memory(dtype, [64, 16], BLOCKS, (Q_d * scale).to(dtype))
    Q16, Q32 = (Q16 * scale).to(dtype), (Q32 * scale).to(dtype)
    s_16 = gl.allocate_shared_memory(dtype, [64, 16], BLOCKS, stacked(Q16))
    s_32 = gl.allocate_shared_memory(dtype, [64, 16], BLOCKS, stacked(Q32))
    put_stack(p, s, s_d, n, 0)
    put_stack(p, s, s_16, n, 1)
    put_stack(p, s, s_32, n, 2)


@gluon.jit
def apply(s_y, s_X, f_0, f_1, dtype: gl.constexpr, LOST: gl.constexpr):
    """X y diag(f), in place; s_y is [2, 64, 64]: 128 columns in halves.

    s_X: see left_block; LOST: behind it what rounding lost of the blocks on the diagonal.
    """
    s_0, s_1 = s_y.index(0), s_y.index(1)
    y_0, y_1 = (), ()
    for j in gl.static_range(4):
        y_0 = y_0 + (block(s_0, j).load(WIDE_RIGHT),)
        y_1 = y_1 + (block(s_1, j).load(WIDE_RIGHT),)
    s_0, s_1 = s_0._reinterpret(dtype, [64, 64], TILES), s_1._reinterpret(dtype, [64, 64], TILES)
    for i in gl.static_range(4):
        b_0 = gl.zeros([16, 64], gl.float32, WIDE)
        b_1 = b_0
        if LOST:
            a = block(s_X, 12 + i).load(WIDE_LEFT)
            b_0, b_1 = mma_v2(a, y_0[i], b_0), mma_v2(a, y_1[i], b_1)
        for j in gl.static_range(i + 1):
            a = left_block(s_X, i, j)
            b_0, b_1 = mma_v2(a, y_0[j], b_0), mma_v2(a, y_1[j], b_1)
        if not LOST:
            b_0, b_1 = b_0 * f_0, b_1 * f_1
        block(s_0, i).store(b_0.to(dtype))
        block(s_1, i).store(b_1.to(dtype))
    return s_0, s_1


@gluon.jit
def column_factor(b_g):
    """exp2(ceil(g_0)) / KB_SCALE of 64 columns."""
    b_g = gl.ceil(b_g)
    return gl.expand_dims(decay(b_g, b_g * 0.0) * (1.0 / KB_SCALE), 0)


@gluon.jit
def store_off_diagonal(s_X, X10, X32, X20, X21, X30, X31):
    block(s_X, 4).store(X10.to(s_X.dtype))
    block(s_X, 7).store(X32.to(s_X.dtype))
    block(s_X, 8).store(X20.to(s_X.dtype))
    block(s_X, 9).store(X21.to(s_X.dtype))
    block(s_X, 10).store(X30.to(s_X.dtype))
    block(s_X, 11).store(X31.to(s_X.dtype))


@gluon.jit
def put_inverse(p, s, s_X, n):
    """Store Akk."""
    for i in gl.static_range(3):
        put_stack(p, s, s_X.slice(64 * i, 64, 0), n, i)
    put_zeros_above(p, s, n)


@gluon.jit
def ask_next(q, k, gk, beta, s_s, row, n, i_h, H: gl.constexpr):
    """Ask for half of the channels of a tile, and for its write strengths, which are returned."""
    o = (row.to(gl.int64) * H + i_h) * 128
    ask_tiles(q + o, k + o, gk + o, s_s, H * 128, n)
    return ask_betas(beta, row, n, i_h, H)


@gluon.jit
def run_tile(
    q, k, v, gk, beta, b_b, w, u, kg, Aqk, Akk, s_s, scale, row, n, row_next, n_next, i_h, i_next,
    H: gl.constexpr, ZERO_UPPER: gl.constexpr,
):  # fmt: skip
    """64 tokens of one head, n of them if fewer are left."""
    dtype: gl.constexpr = k.dtype.element_ty
    head = row.to(gl.int64) * H + i_h
    s: gl.constexpr = H * 128
    to_next = (row_next.to(gl.int64) * H + i_next - head) * 128
    gk, v, w, u = gk + head * 128, v + head * 128, w + head * 128, u + head * 128
    Aqk += head * 64
    s_b = share_betas(b_b)
    s_kb = gl.allocate_shared_memory(gl.float16, [2, 64, 64], KEYS)
    s_x = ()  # apart from each other, for the compiler puts barriers between uses of one of them
    for _ in gl.static_range(6):
        s_x = s_x + (gl.allocate_shared_memory(gl.float16, [64, 64], TILES),)
    q, k, kg = q + head * 128, k + head * 128, kg + head * 128
    b_s, b_8, Q16, G16, Q32, G32 = products(
        q, k, gk, s_b[1], kg, s_s, s_x, s_kb, s, n, to_next, n_next
    )
    o_k = gl.arange(0, 64, WIDE_COLUMNS)
    g_0, g_1, b_next = (
        gl.load(gk + o_k), gl.load(gk + 64 + o_k), ask_betas(beta, row_next, n_next, i_next, H)
    )  # fmt: skip
    s_v = gl.allocate_shared_memory(dtype, [2, 64, 64], TILES)
    ask_values(v, s_v, s, n)

    Q_s, G_s = split_products(b_s)
    Q_8, G_8 = split_products(b_8)
    put_scores(diagonal_blocks(Q_s, Q_8, STACK), Q16, Q32, Aqk, H * 64, scale, n, dtype)
    if ZERO_UPPER:
        put_zeros_above(Aqk, H * 64, n)
    b_16 = betas(s_b[2].slice(32, 32), QUARTERS_ROWS, 1)
    b_32 = betas(s_b[0].slice(32, 32), QUARTERS_ROWS, 1)
    s_N16 = gl.allocate_shared_memory(
        gl.float32, [64, 16], SUMS, stacked(round_once(-b_16 * G16, "fp16"))
    )
    s_N32 = gl.allocate_shared_memory(
        gl.float32, [64, 16], SUMS, stacked(round_once(-b_32 * G32, "fp16"))
    )
    o_r, o_c = gl.arange(0, 64, STACK_ROWS), gl.arange(0, 16, STACK_COLUMNS)
    b_N = diagonal_blocks(G_s, G_8, STACK)
    E_d = inv_stack(b_N * -betas(s_b[0], STACK_ROWS, 1))
    s_X = gl.allocate_shared_memory(gl.float16, [256, 16], BLOCKS)
    s_X.slice(0, 64, 0).store(E_d.to(gl.float16))
    X10, X32, X20, X21, X30, X31 = merge_stack(s_X, s_N16, s_N32)
    o_r, o_c = gl.expand_dims(o_r, 1), gl.expand_dims(o_c, 0)
    X_d = E_d + gl.where((o_r & 15) == o_c, 1.0, 0.0)
    barrier()
    s_X.slice(0, 64, 0).store(X_d.to(gl.float16))
    store_off_diagonal(s_X, X10, X32, X20, X21, X30, X31)
    if Akk is not None:
        s_A = gl.allocate_shared_memory(dtype, [256, 16], BLOCKS)
        s_A.slice(0, 64, 0).store(X_d.to(dtype))
        store_off_diagonal(s_A, X10, X32, X20, X21, X30, X31)
        put_inverse(Akk + head * 64, H * 64, s_A, n)
    s_U = gl.allocate_shared_memory(dtype, [256, 16], BLOCKS)
    X_d = X_d.reshape((4, 16, 16))
    s_d = s_b[0]._reinterpret(gl.float32, [4, 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    X_d = X_d * gl.expand_dims(s_d.load(gl.SliceLayout(1, X_d.type.layout)), 1)
    X_d = gl.convert_layout(X_d.reshape((64, 16)), STACK)
    s_U.slice(0, 64, 0).store(X_d.to(dtype))
    s_U.slice(192, 64, 0).store((X_d - X_d.to(dtype).to(gl.float32)).to(dtype))
    b_0 = betas(s_b[0].slice(0, 16), WIDE_COLUMNS, 0)
    b_1 = betas(s_b[0].slice(16, 16), WIDE_COLUMNS, 0)
    b_2 = betas(s_b[0].slice(32, 16), WIDE_COLUMNS, 0)
    store_off_diagonal(s_U, X10 * b_0, X32 * b_2, X20 * b_0, X21 * b_1, X30 * b_0, X31 * b_1)

    f_0, f_1 = column_factor(g_0), column_factor(g_1)
    s_0, s_1 = apply(s_kb, s_X, f_0, f_1, dtype, False)
    store_rows(w, s, s_0, n)
    store_rows(w + 64, s, s_1, n)
    async_copy.wait_group(0)
    barrier()
    s_0, s_1 = apply(s_v, s_U, f_0, f_1, dtype, True)
    store_rows(u, s, s_0, n)
    store_rows(u + 64, s, s_1, n)
    return b_next


@gluon.jit(
    do_not_specialize=["T", "N", "per_row", "tiles"],
    do_not_specialize_on_alignment=["cu_seqlens", "chunk_indices"],
)
def kda_intra_kernel_sm90(
    q, k, v, gk, beta, w, u, kg, Aqk, Akk, cu_seqlens, chunk_indices, scale, T, N, per_row, tiles,
    H: gl.constexpr, VARLEN: gl.constexpr, ZERO_UPPER: gl.constexpr,
):  # fmt: skip
    """As kda_intra_kernel, products in fp16, K and V 128. One program, four warps: tile by tile of
    64 tokens of one head, heads first, with the next one's first half on the way. Akk may be None.
    """
    dtype: gl.constexpr = k.dtype.element_ty
    s_s = (
        gl.allocate_shared_memory(dtype, [64, 64], COPY),
        gl.allocate_shared_memory(dtype, [64, 64], COPY),
        gl.allocate_shared_memory(gl.float32, [64, 64], COPY),
    )
    i_p, step = gl.program_id(0), gl.num_programs(0)
    first, bos, eos = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(-64)  # no sequence yet
    row_next, n_next, first, bos, eos = locate_tile(
        cu_seqlens, chunk_indices, i_p, tiles, T, N, per_row, first, bos, eos, H, VARLEN
    )
    b_next = ask_next(q, k, gk, beta, s_s, row_next, n_next, i_p % H, H)
    for p in range(i_p, tiles, step):
        row, n, b_b = row_next, n_next, b_next.to(gl.float32)
        row_next, n_next, first, bos, eos = locate_tile(
            cu_seqlens, chunk_indices, p + step, tiles, T, N, per_row, first, bos, eos, H, VARLEN
        )
        i_next = (p + step) % H
        if n <= 0:
            async_copy.wait_group(0)  # zeros are on their way to where the next tile goes
            b_next = ask_next(q, k, gk, beta, s_s, row_next, n_next, i_next, H)
        else:
            b_next = run_tile(
                q, k, v, gk, beta, b_b, w, u, kg, Aqk, Akk, s_s, scale, row, n, row_next, n_next,
                p % H, i_next, H, ZERO_UPPER,
            )  # fmt: skip
