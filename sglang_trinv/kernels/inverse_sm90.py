"""The inverse of every chunk for Hopper, in Gluon: kkt_solve's and the whole prefill's."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang_trinv.kernels.blocks_sm90 import finished, with_identity
from sglang_trinv.kernels.chunk_sm90 import (
    TOKENS,
    ask,
    gram_blocks,
    inverse_blocks,
    locate_tile,
    put,
    store_blocks,
    store_length,
)
from sglang_trinv.kernels.fwd_intra import LOG2E
from sglang_trinv.kernels.prefill_tiles_sm90 import barrier, clear_rows


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def ask_tile(
    k, g, beta, row, n, i_h, bar, s_0, s_1, H: gl.constexpr, Hg: gl.constexpr
):  # fmt: skip
    """Ask for a tile's keys; returns g and beta as they are, past the end those of the last row.

    Nothing may branch between this and the end of the loop's body: a branch waits for loads.
    """
    if n > 0:
        ask(k, row, i_h // (H // Hg) * 128, bar, s_0, s_1)
    o_t = gl.maximum(gl.minimum(gl.arange(0, 64, TOKENS), n - 1), 0)
    p_t = (gl.where(n > 0, row, 0) + o_t).to(gl.int64) * H + i_h
    b_g = gl.zeros([64], gl.float32, TOKENS)
    if g is not None:
        b_g = gl.load(g + p_t)
    return b_g, gl.load(beta + p_t)


@gluon.jit(
    do_not_specialize=["T", "N", "per_row", "tiles"],
    do_not_specialize_on_alignment=["cu_seqlens", "chunk_indices"],
)
def inverse_kernel_sm90(
    k, g, beta, out_desc, out, factors, marks, cu_seqlens, chunk_indices, T, N, per_row, tiles,
    H: gl.constexpr, Hg: gl.constexpr, VARLEN: gl.constexpr, NORM: gl.constexpr,
    BESIDE: gl.constexpr,
):  # fmt: skip
    """One warp a program: chunk by chunk of one value head, with the next one's keys on the way.

    A tile is a chunk of a head, heads first.
    Tensor descriptors in tiles of [64, 64]: k [T, Hg 128] and out_desc. K is 128.
    kkt_solve: g is summed over the chunk, out [T, H, 64], out_desc [T, H 64], factors and marks
    None. Prefill: g is not summed, out None, out_desc [slots H 64, 64], factors as
    inverse_kernel's, and the marks of state_kernel_sm90, which are set to zero.
    """
    PREFILL: gl.constexpr = factors is not None
    dtype: gl.constexpr = k.dtype
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_k = gl.allocate_shared_memory(dtype, [2, 64, 64], k.layout)
    s_0, s_1 = s_k.index(0), s_k.index(1)
    s_A = gl.allocate_shared_memory(dtype, [64, 64], k.layout)
    s_g = gl.allocate_shared_memory(gl.float32, [64], flat)
    s_b = gl.allocate_shared_memory(gl.float32, [64], flat)
    s_r = gl.allocate_shared_memory(gl.float32, [64], flat)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    fence_async_shared()
    barrier()
    o_t = gl.arange(0, 64, TOKENS)
    phase, i_p, step = 0, gl.program_id(0), gl.num_programs(0)
    if PREFILL:
        gdc_wait()
        gdc_launch_dependents()
        gl.store(marks, 0)
    first, bos, eos = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(-64)  # no sequence yet
    row_next, n_next, first, bos, eos = locate_tile(
        cu_seqlens, chunk_indices, i_p, tiles, T, N, per_row, first, bos, eos, H, VARLEN
    )
    g_next, b_next = ask_tile(k, g, beta, row_next, n_next, i_p % H, bar, s_0, s_1, H, Hg)
    for p in range(i_p, tiles, step):
        row, n, b_g, b_b = row_next, n_next, g_next, b_next
        row_next, n_next, first, bos, eos = locate_tile(
            cu_seqlens, chunk_indices, p + step, tiles, T, N, per_row, first, bos, eos, H, VARLEN
        )
        if n <= 0:
            g_next, b_next = ask_tile(
                k, g, beta, row_next, n_next, (p + step) % H, bar, s_0, s_1, H, Hg
            )
        else:
            mbarrier.wait(bar, phase)
            phase ^= 1
            if n < 64:
                clear_rows(s_0, n)
                clear_rows(s_1, n)
                fence_async_shared()  # the next keys come to where these zeros are
            G = gram_blocks(s_0, s_1)
            barrier()
            b_g = b_g.to(gl.float32) * LOG2E
            b_b = gl.where(o_t < n, b_b.to(gl.float32), 0.0)
            if PREFILL:
                b_g = gl.associative_scan(gl.where(o_t < n, b_g, 0.0), 0, add)
            s_g.store(b_g)
            s_b.store(b_b)
            g_next, b_next = ask_tile(
                k, g, beta, row_next, n_next, (p + step) % H, bar, s_0, s_1, H, Hg
            )
            if PREFILL:
                g_last = s_g.slice(63, 1).load(TOKENS)
                store_length(s_r, G[0], 0, n, NORM)
                store_length(s_r, G[2], 1, n, NORM)
                store_length(s_r, G[5], 2, n, NORM)
                store_length(s_r, G[9], 3, n, NORM)
                b_r = s_r.load(TOKENS)
                p_f = factors + p.to(gl.int64) * 384 + o_t
                if BESIDE:
                    gl.store(marks + 1 + p // (H // Hg), 0)
                gl.store(p_f, b_b * b_r * gl.exp2(b_g))
                gl.store(p_f + 64, b_b)
                gl.store(p_f + 128, b_r * gl.exp2(g_last - b_g))
                gl.store(p_f + 256, b_g)
                gl.store(p_f + 320, b_r)
                X = inverse_blocks(G, s_g, s_b, s_r, "fp16")
                X = (
                    finished(X[0], dtype), X[1], finished(X[2], dtype), X[3], X[4],
                    finished(X[5], dtype), X[6], X[7], X[8], finished(X[9], dtype),
                )  # fmt: skip
            else:
                X = with_identity(inverse_blocks(G, s_g, s_b, None, "fp16"))
            tma.store_wait(0)
            barrier()
            store_blocks(s_A, X)
            if PREFILL:
                put(out_desc, out, s_A, p * 64, 0, 64, 64)
            else:
                put(out_desc, out, s_A, row, p % H * 64, n, H * 64)
    tma.store_wait(0)
