"""One warp and one chunk of one value head on Hopper: keys in, blocks of the inverse out.

Tiles [64, 64] come and go by TMA. Ten blocks are those on and below the diagonal, row by row.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sglang_trinv.kernels.blocks_sm90 import COLUMNS, LEFT, RIGHT, ROWS, inv_16, merge_64
from sglang_trinv.kernels.prefill_prepare import L2NORM_EPS
from sglang_trinv.kernels.prefill_tiles_sm90 import barrier
from sglang_trinv.kernels.quarters_sm90 import BLOCK

TOKENS = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))  # a value for each token of a chunk


@gluon.jit
def larger(a, b):
    return gl.maximum(a, b)


@gluon.jit
def smaller(a, b):
    return gl.minimum(a, b)


@gluon.jit
def find_sequence(cu_seqlens, i_t, N):
    """Chunk i_t's sequence: its first chunk, its first row and the row behind its last.

    The chunks of sequence n are those from cu_seqlens[n] // 64 + n on. All loads at once.
    """
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [gl.num_warps()], [0])
    first, bos, eos = 0, 0, 0x7FFFFFFF
    for i in range(0, N + 1, 64):
        o_n = gl.arange(0, 64, layout) + i
        b_bos = gl.load(cu_seqlens + o_n, mask=o_n <= N, other=0x7FFFFFFF).to(gl.int32)
        begun = (b_bos // 64 + o_n <= i_t) & (o_n < N)
        first = gl.maximum(first, gl.reduce(gl.where(begun, b_bos // 64 + o_n, 0), 0, larger))
        bos = gl.maximum(bos, gl.reduce(gl.where(begun, b_bos, 0), 0, larger))
        eos = gl.minimum(eos, gl.reduce(gl.where(begun, 0x7FFFFFFF, b_bos), 0, smaller))
    return first, bos, eos


@gluon.jit
def locate(cu_seqlens, chunk_indices, i_t, T, N, per_row, VARLEN: gl.constexpr):
    """First row of chunk i_t and how many rows its sequence has from there on, below 1 for none.

    Without cu_seqlens a row of the batch has per_row chunks.
    """
    if VARLEN:
        if chunk_indices is None:
            first, bos, eos = find_sequence(cu_seqlens, i_t, N)
            o_t = (i_t - first) * 64
        else:
            i_n = gl.load(chunk_indices + i_t * 2).to(gl.int32)
            o_t = gl.load(chunk_indices + i_t * 2 + 1).to(gl.int32) * 64
            bos = gl.load(cu_seqlens + i_n).to(gl.int32)
            eos = gl.load(cu_seqlens + i_n + 1).to(gl.int32)
    else:
        bos = i_t // per_row * T
        eos = bos + T
        o_t = i_t % per_row * 64
    return bos + o_t, eos - bos - o_t


@gluon.jit
def locate_tile(
    cu_seqlens, chunk_indices, p, tiles, T, N, per_row, first, bos, eos,
    H: gl.constexpr, VARLEN: gl.constexpr,
):  # fmt: skip
    """As ``locate``, n = 0 past the last tile; first, bos, eos: the last tile's find_sequence.

    Asking cu_seqlens again takes longer than to see that the sequence is still the same.
    """
    row, n = 0, 0
    i_t = p // H
    if p < tiles:
        if VARLEN and chunk_indices is None:
            if i_t - first > eos // 64 - bos // 64:
                first, bos, eos = find_sequence(cu_seqlens, i_t, N)
            row = bos + (i_t - first) * 64
            n = eos - row
        else:
            row, n = locate(cu_seqlens, chunk_indices, i_t, T, N, per_row, VARLEN)
    return row, n, first, bos, eos


@gluon.jit
def ask(desc, row, c, bar, s_0, s_1):
    """Ask for two tiles side by side."""
    mbarrier.expect(bar, 2 * desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, c], bar, s_0)
    tma.async_copy_global_to_shared(desc, [row, c + 64], bar, s_1)


@gluon.jit
def gram(s_0, s_1, I: gl.constexpr, J: gl.constexpr):
    """Block (I, J) of K K^T, the columns of K in two halves."""
    b_G = gl.zeros([16, 16], gl.float32, BLOCK)
    b_G = mma_v2(s_0.slice(16 * I, 16, 0).load(LEFT),
                 s_0.slice(16 * J, 16, 0).permute((1, 0)).load(RIGHT), b_G)  # fmt: skip
    return mma_v2(s_1.slice(16 * I, 16, 0).load(LEFT),
                  s_1.slice(16 * J, 16, 0).permute((1, 0)).load(RIGHT), b_G)  # fmt: skip


@gluon.jit
def store_length(s_r, b_G, I: gl.constexpr, n, NORM: gl.constexpr):
    """1 / |k| of 16 rows, from the diagonal of their products; 0 past the end."""
    o_i, o_j = gl.arange(0, 16, ROWS), gl.arange(0, 16, COLUMNS)
    b_d = gl.sum(gl.where(gl.expand_dims(o_i, 1) == gl.expand_dims(o_j, 0), b_G, 0.0), 1)
    b_r = gl.rsqrt(b_d + L2NORM_EPS) if NORM else gl.full([16], 1.0, gl.float32, ROWS)
    s_r.slice(16 * I, 16).store(gl.where(o_i + 16 * I < n, b_r, 0.0))


@gluon.jit
def diagonal_block(b_G, s_g, s_b, s_r, I: gl.constexpr):
    """N = -strict_tril(beta_i exp(g_i - g_j) r_i G_ij r_j) of a diagonal block."""
    o_i, o_j = gl.arange(0, 16, ROWS), gl.arange(0, 16, COLUMNS)
    g_i, g_j = s_g.slice(16 * I, 16).load(ROWS), s_g.slice(16 * I, 16).load(COLUMNS)
    b_i = -s_b.slice(16 * I, 16).load(ROWS)
    b_N = b_G * gl.exp2(gl.expand_dims(g_i, 1) - gl.expand_dims(g_j, 0))
    if s_r is None:
        b_N *= gl.expand_dims(b_i, 1)
    else:
        b_i *= s_r.slice(16 * I, 16).load(ROWS)
        b_N *= gl.expand_dims(b_i, 1) * gl.expand_dims(s_r.slice(16 * I, 16).load(COLUMNS), 0)
    return gl.where(gl.expand_dims(o_i, 1) > gl.expand_dims(o_j, 0), b_N, 0.0)


@gluon.jit
def row_factor(s_g, s_b, s_r, I: gl.constexpr):
    """-beta_i exp(g_i - g_first) r_i of 16 rows, and g_first of each column of a block."""
    g_i, g_0 = s_g.slice(16 * I, 16).load(ROWS), s_g.slice(16 * I, 1).load(ROWS)
    b_i = -s_b.slice(16 * I, 16).load(ROWS)
    if s_r is not None:
        b_i *= s_r.slice(16 * I, 16).load(ROWS)
    return gl.expand_dims(b_i * gl.exp2(g_i - g_0), 1)


@gluon.jit
def below_block(b_G, b_row, s_g, s_r, I: gl.constexpr, J: gl.constexpr):
    """N of block (I, J) below the diagonal: both factors are <= 1 where g does not grow."""
    g_0, g_j = s_g.slice(16 * I, 1).load(COLUMNS), s_g.slice(16 * J, 16).load(COLUMNS)
    b_j = gl.exp2(g_0 - g_j)
    if s_r is not None:
        b_j *= s_r.slice(16 * J, 16).load(COLUMNS)
    return b_G * b_row * gl.expand_dims(b_j, 0)


@gluon.jit
def store_row(s_A, I: gl.constexpr, b_0, b_1, b_2, b_3):
    """Four blocks side by side."""
    dtype: gl.constexpr = s_A.dtype
    b_01 = gl.join(b_0.to(dtype), b_1.to(dtype)).permute((0, 2, 1)).reshape((16, 32))
    b_23 = gl.join(b_2.to(dtype), b_3.to(dtype)).permute((0, 2, 1)).reshape((16, 32))
    b_x = gl.join(b_01, b_23).permute((0, 2, 1)).reshape((16, 64))
    s_A.slice(16 * I, 16, 0).store(gl.convert_layout(b_x, BLOCK))


@gluon.jit
def store_blocks(s_A, X):
    """Ten blocks and zeros above them."""
    b_0 = gl.zeros([16, 16], gl.float32, BLOCK)
    store_row(s_A, 0, X[0], b_0, b_0, b_0)
    store_row(s_A, 1, X[1], X[2], b_0, b_0)
    store_row(s_A, 2, X[3], X[4], X[5], b_0)
    store_row(s_A, 3, X[6], X[7], X[8], X[9])


@gluon.jit
def gram_blocks(s_0, s_1):
    """Ten blocks of K K^T."""
    G00, G10, G11 = gram(s_0, s_1, 0, 0), gram(s_0, s_1, 1, 0), gram(s_0, s_1, 1, 1)
    G20, G21, G22 = gram(s_0, s_1, 2, 0), gram(s_0, s_1, 2, 1), gram(s_0, s_1, 2, 2)
    G30, G31 = gram(s_0, s_1, 3, 0), gram(s_0, s_1, 3, 1)
    return G00, G10, G11, G20, G21, G22, G30, G31, gram(s_0, s_1, 3, 2), gram(s_0, s_1, 3, 3)


@gluon.jit
def inverse_blocks(G, s_g, s_b, s_r, DOT: gl.constexpr):
    """Ten blocks of X from those of K K^T; those on the diagonal are E = X - I."""
    E00, b_E00, E11, b_E11 = inv_16(
        diagonal_block(G[0], s_g, s_b, s_r, 0), diagonal_block(G[2], s_g, s_b, s_r, 1), DOT
    )
    E22, b_E22, E33, _ = inv_16(
        diagonal_block(G[5], s_g, s_b, s_r, 2), diagonal_block(G[9], s_g, s_b, s_r, 3), DOT
    )
    row_1, row_2 = row_factor(s_g, s_b, s_r, 1), row_factor(s_g, s_b, s_r, 2)
    row_3 = row_factor(s_g, s_b, s_r, 3)
    N10 = below_block(G[1], row_1, s_g, s_r, 1, 0)
    N20 = below_block(G[3], row_2, s_g, s_r, 2, 0)
    N21 = below_block(G[4], row_2, s_g, s_r, 2, 1)
    N30 = below_block(G[6], row_3, s_g, s_r, 3, 0)
    N31 = below_block(G[7], row_3, s_g, s_r, 3, 1)
    N32 = below_block(G[8], row_3, s_g, s_r, 3, 2)
    X10, X20, X21, X30, X31, X32 = merge_64(
        E11, E22, E33, b_E00, b_E11, b_E22, N10, N20, N21, N30, N31, N32, DOT
    )  # fmt: skip
    return E00, X10, E11, X20, X21, E22, X30, X31, X32, E33


@gluon.jit
def put(desc, y, s_y, row, c, n, WIDTH: gl.constexpr):
    """Copy a tile that was just written to columns c and to rows ``row`` on, n of them at most."""
    fence_async_shared()
    barrier()
    if n < 64:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
        o_r = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, layout)), 1)
        o_c = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
        p_y = y + row.to(gl.int64) * WIDTH + c + o_r * WIDTH + o_c
        gl.store(p_y, s_y.load(layout), mask=(o_r < n) & (o_c >= 0))
    else:
        tma.async_copy_shared_to_global(desc, [row, c], s_y)
