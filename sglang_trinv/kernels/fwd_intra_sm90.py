"""The Gated DeltaNet intra-chunk step for Hopper: fwd_intra.fwd_intra_kernel in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sglang_trinv.kernels.blocks_sm90 import (
    COLUMNS,
    RIGHT,
    ROWS,
    left,
    rounded,
    with_identity,
)
from sglang_trinv.kernels.chunk_sm90 import (
    TOKENS,
    ask,
    gram_blocks,
    inverse_blocks,
    locate,
    put,
    store_blocks,
)
from sglang_trinv.kernels.fwd_intra import LOG2E
from sglang_trinv.kernels.prefill_tiles_sm90 import barrier, clear_rows
from sglang_trinv.kernels.quarters_sm90 import BLOCK


@gluon.jit
def scaled(b_x, s_s, J: gl.constexpr, dtype: gl.constexpr):
    """A block of columns J times their factors, as a left operand."""
    return left(b_x * gl.expand_dims(s_s.slice(16 * J, 16).load(COLUMNS), 0), dtype)


@gluon.jit
def scaled_blocks(X, s_s, dtype: gl.constexpr):
    """Ten blocks of X diag(s)."""
    return (
        scaled(X[0], s_s, 0, dtype), scaled(X[1], s_s, 0, dtype), scaled(X[2], s_s, 1, dtype),
        scaled(X[3], s_s, 0, dtype), scaled(X[4], s_s, 1, dtype), scaled(X[5], s_s, 2, dtype),
        scaled(X[6], s_s, 0, dtype), scaled(X[7], s_s, 1, dtype), scaled(X[8], s_s, 2, dtype),
        scaled(X[9], s_s, 3, dtype),
    )  # fmt: skip


@gluon.jit
def lost(s_s, J: gl.constexpr, dtype: gl.constexpr):
    """What rounding loses of the factors of columns J: where X is nearly I, nothing else errs."""
    r = gl.expand_dims(gl.arange(0, 16, ROWS), 1)
    c = gl.expand_dims(gl.arange(0, 16, COLUMNS), 0)
    b_s = s_s.slice(16 * J, 16).load(COLUMNS)
    b_s = gl.expand_dims(b_s - rounded(b_s, dtype), 0)
    # A product, not a choice: zeros that the compiler knows of, it makes again for every mma.
    return left(b_s * gl.where(r == c, 1.0, 0.0), dtype)


@gluon.jit
def apply_blocks(a, d_0, d_1, d_2, d_3, s_x):
    """A tile [64, 64] in shared memory by a + d of it, d on the diagonal.

    From the last rows up, in place, each read again for every row of blocks: registers are scarce.
    """
    dtype: gl.constexpr = s_x.dtype
    s_0, s_1 = s_x.slice(0, 16, 0), s_x.slice(16, 16, 0)
    s_2, s_3 = s_x.slice(32, 16, 0), s_x.slice(48, 16, 0)
    zeros = gl.zeros([16, 64], gl.float32, BLOCK)
    b_x = s_3.load(RIGHT)
    b_y = mma_v2(a[9], b_x, mma_v2(d_3, b_x, zeros))
    b_y = mma_v2(a[7], s_1.load(RIGHT), mma_v2(a[6], s_0.load(RIGHT), b_y))
    s_3.store(mma_v2(a[8], s_2.load(RIGHT), b_y).to(dtype))
    b_x = s_2.load(RIGHT)
    b_y = mma_v2(a[5], b_x, mma_v2(d_2, b_x, zeros))
    b_y = mma_v2(a[4], s_1.load(RIGHT), mma_v2(a[3], s_0.load(RIGHT), b_y))
    s_2.store(b_y.to(dtype))
    b_x = s_1.load(RIGHT)
    b_y = mma_v2(a[2], b_x, mma_v2(d_1, b_x, zeros))
    s_1.store(mma_v2(a[1], s_0.load(RIGHT), b_y).to(dtype))
    b_x = s_0.load(RIGHT)
    s_0.store(mma_v2(a[0], b_x, mma_v2(d_0, b_x, zeros)).to(dtype))


@gluon.jit
def ask_half(desc, row, c, bar, s, PENDING: gl.constexpr):
    """Ask for a tile where one goes from, all but PENDING of the copies before having been read."""
    tma.store_wait(PENDING)
    fence_async_shared()
    barrier()
    mbarrier.expect(bar, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, c], bar, s)


@gluon.jit(
    do_not_specialize=["T", "N", "per_row"],
    do_not_specialize_on_alignment=["cu_seqlens", "chunk_indices"],
)
def fwd_intra_kernel_sm90(
    k, v, w_desc, u_desc, A_desc, v_rows, w, u, Ai, g, beta, cu_seqlens, chunk_indices, T, N,
    per_row, s_v,
    H: gl.constexpr, Hg: gl.constexpr, VARLEN: gl.constexpr, FEW: gl.constexpr,
):  # fmt: skip
    """One program, one warp: a chunk of 64 tokens of one value head; K and V are 128.

    Tensor descriptors in tiles of [64, 64]: k [T, Hg K], v and u_desc [T, H V], w_desc [T, H K],
    A_desc [T, H 64] or None; the results again as pointers, for the last rows of a sequence. g and
    beta as in fwd_intra_kernel. With FEW, no more programs than fit the GPU, L2 fetches v (v_rows,
    s_v from token to token) before there is room for it; with more it would fetch too much.
    """
    i_h = gl.program_id(0) % H
    bar = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    bar_0, bar_1 = bar.index(0), bar.index(1)
    mbarrier.init(bar_0, count=1)
    mbarrier.init(bar_1, count=1)
    row, n = locate(cu_seqlens, chunk_indices, gl.program_id(0) // H, T, N, per_row, VARLEN)
    if n <= 0:
        return
    dtype: gl.constexpr = k.dtype
    s_x = gl.allocate_shared_memory(dtype, [2, 64, 64], k.layout)
    s_0, s_1 = s_x.index(0), s_x.index(1)
    fence_async_shared()
    barrier()
    ask(k, row, i_h // (H // Hg) * 128, bar_0, s_0, s_1)

    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_g = gl.allocate_shared_memory(gl.float32, [64], flat)
    s_b = gl.allocate_shared_memory(gl.float32, [64], flat)
    s_s = gl.allocate_shared_memory(gl.float32, [64], flat)
    o_t = gl.arange(0, 64, TOKENS)
    p_t = (row + gl.minimum(o_t, n - 1)).to(gl.int64) * H + i_h
    b_b = gl.where(o_t < n, gl.load(beta + p_t).to(gl.float32), 0.0)
    b_g = gl.zeros([64], gl.float32, TOKENS)
    if g is not None:
        b_g = gl.load(g + p_t).to(gl.float32) * LOG2E
    s_g.store(b_g)
    s_b.store(b_b)
    s_s.store(b_b * gl.exp2(b_g))

    mbarrier.wait(bar_0, 0)
    if FEW:
        o_v = (row + gl.minimum(o_t, n - 1)).to(gl.int64) * s_v + i_h * 128
        fetch: gl.constexpr = "cp.async.bulk.prefetch.L2.global [$1], 256; mov.b32 $0, 0;"
        gl.inline_asm_elementwise(fetch, "=r,l", [(v_rows + o_v).to(gl.int64)], gl.int32, False, 1)
    if n < 64:
        clear_rows(s_0, n)
        clear_rows(s_1, n)
    X = with_identity(inverse_blocks(gram_blocks(s_0, s_1), s_g, s_b, None, "fp16"))
    if A_desc is not None:  # stored at the end X would not fit the registers
        s_A = gl.allocate_shared_memory(dtype, [64, 64], k.layout)
        store_blocks(s_A, X)
        put(A_desc, Ai, s_A, row, i_h * 64, n, H * 64)
        tma.store_wait(0)
    a_w, a_u = scaled_blocks(X, s_s, dtype), scaled_blocks(X, s_b, dtype)
    d_0, d_1 = lost(s_s, 0, dtype), lost(s_s, 1, dtype)
    d_2, d_3 = lost(s_s, 2, dtype), lost(s_s, 3, dtype)
    apply_blocks(a_w, d_0, d_1, d_2, d_3, s_0)
    put(w_desc, w, s_0, row, i_h * 128, n, H * 128)
    apply_blocks(a_w, d_0, d_1, d_2, d_3, s_1)
    put(w_desc, w, s_1, row, i_h * 128 + 64, n, H * 128)
    ask_half(v, row, i_h * 128, bar_0, s_0, 1)
    ask_half(v, row, i_h * 128 + 64, bar_1, s_1, 0)
    d_0, d_1 = lost(s_b, 0, dtype), lost(s_b, 1, dtype)
    d_2, d_3 = lost(s_b, 2, dtype), lost(s_b, 3, dtype)
    mbarrier.wait(bar_0, 1)
    if n < 64:
        clear_rows(s_0, n)
    apply_blocks(a_u, d_0, d_1, d_2, d_3, s_0)
    put(u_desc, u, s_0, row, i_h * 128, n, H * 128)
    mbarrier.wait(bar_1, 0)
    if n < 64:
        clear_rows(s_1, n)
    apply_blocks(a_u, d_0, d_1, d_2, d_3, s_1)
    put(u_desc, u, s_1, row, i_h * 128 + 64, n, H * 128)
    tma.store_wait(0)
