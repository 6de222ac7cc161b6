"""The state pass for Hopper, in Gluon: TMA, asynchronous wgmma, operands kept in registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in Triton 3.7


@gluon.jit
def clear_rows(s, n):
    """Zero the rows of a tile from row n on: they belong to another sequence."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    o_t = gl.arange(0, 64, gl.SliceLayout(1, layout))
    x = s.load(layout)
    s.store(gl.where(gl.expand_dims(o_t < n, 1), x, gl.zeros_like(x)))


@gluon.jit
def locate(cu_seqlens, i_n, T, VARLEN: gl.constexpr):
    """As prefill_state.locate_sequence."""
    if VARLEN:
        bos = gl.load(cu_seqlens + i_n).to(gl.int32)
        return bos, gl.load(cu_seqlens + i_n + 1).to(gl.int32) - bos, bos // 64 + i_n
    else:
        return i_n * T, T, i_n * (T // 64 + 1)


@gluon.jit
def segment_chunks(i_s, n_tokens, G):
    """(first chunk, number of chunks, if any) of segment ``i_s``: see prefill_state.segment."""
    NT = (n_tokens + 63) // 64
    size = (NT + G - 1) // G
    return i_s * size, gl.minimum(size, NT - i_s * size)


@gluon.jit
def stage_barriers(STAGES: gl.constexpr, READERS: gl.constexpr):
    """("filled", "free") of each stage; ``READERS`` warpgroups say that it is free."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=READERS)
    return full, free


@gluon.jit
def factor(s, ROW: gl.constexpr, layout: gl.constexpr):
    return gl.expand_dims(s.slice(ROW * 64, 64).load(gl.SliceLayout(0, layout)), 0)


@gluon.jit
def load_tiles(
    q, k, v, blocks, factors, s_q, s_k, s_v, s_A, s_P, s_f, full_e, free_e, full_l, free_l,
    row, tile, NT, c_k, c_v, H: gl.constexpr, EARLY: gl.constexpr, LATE: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    """One warp: copy chunk after chunk into shared memory, as far ahead as there is room."""
    early: gl.constexpr = (
        k.block_type.nbytes + HALVES * v.block_type.nbytes + blocks.block_type.nbytes
        + factors.block_type.nbytes
    )  # fmt: skip
    late: gl.constexpr = q.block_type.nbytes + blocks.block_type.nbytes
    for i_t in range(NT):
        e = i_t % EARLY
        bar = full_e.index(e)
        mbarrier.wait(free_e.index(e), ((i_t // EARLY) & 1) ^ 1)
        mbarrier.expect(bar, early)
        tma.async_copy_global_to_shared(k, [row, c_k], bar, s_k.index(e))
        tma.async_copy_global_to_shared(factors, [tile * 384], bar, s_f.index(e))
        for i in gl.static_range(HALVES):
            tma.async_copy_global_to_shared(v, [row, c_v + i * 64], bar, s_v.index(e * HALVES + i))
        tma.async_copy_global_to_shared(blocks, [tile * 128, 0], bar, s_A.index(e))
        i_l = i_t % LATE
        bar = full_l.index(i_l)
        mbarrier.wait(free_l.index(i_l), ((i_t // LATE) & 1) ^ 1)
        mbarrier.expect(bar, late)
        tma.async_copy_global_to_shared(q, [row, c_k], bar, s_q.index(i_l))
        tma.async_copy_global_to_shared(blocks, [tile * 128 + 64, 0], bar, s_P.index(i_l))
        row += 64
        tile += H


@gluon.jit
def run_chunks(
    o_desc, gates, o, h, state, starts, track, s_q, s_k, s_v, s_A, s_P, s_f, s_o, full_e, free_e,
    full_l, free_l, index, s_state, row, n_tokens, tile, first, i_track, NT, i_n, i_ns, i_h, i_v,
    H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, EARLY: gl.constexpr, LATE: gl.constexpr,
    HALVES: gl.constexpr, HAS_STATE: gl.constexpr, HAS_STARTS: gl.constexpr,
    WRITE_STATE: gl.constexpr, STORE_H: gl.constexpr, TRACK: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows of the transposed state through NT chunks of a sequence.

    The compiler waits for all products in flight before it writes to shared memory. So a chunk's
    output goes there at its end, when none are, and on from there in the next chunk.
    """
    mma_t: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    mma_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma_t, 2)
    left_k: gl.constexpr = gl.DotOperandLayout(0, mma_k, 2)
    dtype: gl.constexpr = s_k.dtype
    c_v = i_h * V + (i_v * HALVES + HALF) * 64
    o_v = (i_v * HALVES + HALF) * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma_k))
    o_vk = gl.expand_dims(o_v, 1) * K + gl.expand_dims(gl.arange(0, K, gl.SliceLayout(0, mma_k)), 0)
    p_state = state + index * s_state + i_h * (V * K)
    b_S = gl.zeros([64, K], gl.float32, mma_k)
    if HAS_STARTS:
        b_S = gl.load(starts + (i_ns.to(gl.int64) * H + i_h) * (V * K) + o_vk)
    elif HAS_STATE:
        if index >= 0:
            b_S = gl.load(p_state + o_vk).to(gl.float32)
    zeros = gl.zeros([64, 64], gl.float32, mma_t)
    b_y = zeros.to(dtype)
    row_y = row * 0 - 64  # outside the tensor: not written
    b_h = b_S.to(dtype)
    d = gl.load(gates + tile * 384 + 319)
    s_o = s_o.index(HALF)

    for i_t in range(NT):
        e, i_l = i_t % EARLY, i_t % LATE
        if STORE_H:
            gl.store(h + ((first + i_t).to(gl.int64) * H + i_h) * (V * K) + o_vk, b_h)
        if TRACK:
            if i_t == i_track:
                gl.store(track + (i_n.to(gl.int64) * H + i_h) * (V * K) + o_vk, b_S)
        b_hl = gl.convert_layout(b_h, left)
        mbarrier.wait(full_e.index(e), (i_t // EARLY) & 1)
        n = n_tokens - i_t * 64
        if n < 64:
            mbarrier.wait(full_l.index(i_l), (i_t // LATE) & 1)
            clear_rows(s_k.index(e), n)
            clear_rows(s_q.index(i_l), n)
            clear_rows(s_v.index(e * HALVES + HALF), n)
            fence_async_shared()
            barrier()
        t_X = warpgroup_mma(b_hl, s_k.index(e).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(full_l.index(i_l), (i_t // LATE) & 1)
        t_o = warpgroup_mma(
            b_hl, s_q.index(i_l).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        fence_async_shared()
        barrier()
        tma.async_copy_shared_to_global(o_desc, [row_y, c_v], s_o)
        mbarrier.arrive(free_e.index((i_t + EARLY - 1) % EARLY), pred=i_t > 0)
        if LATE > 1:
            mbarrier.arrive(free_l.index((i_t + LATE - 1) % LATE), pred=i_t > 0)
        f = s_f.index(e)
        b_b = factor(f, 1, mma_t)
        b_v = s_v.index(e * HALVES + HALF).permute((1, 0)).load(mma_t).to(gl.float32) * b_b
        b_a = factor(f, 0, mma_t) * b_b
        tile += H
        g_next = gl.load(gates + tile * 384 + 319, mask=i_t + 1 < NT, other=0.0)
        b_X = warpgroup_mma_wait(1, [t_X])
        b_D = gl.convert_layout((b_v - b_X * b_a).to(dtype), left)
        t_U = warpgroup_mma(b_D, s_A.index(e).permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_S = b_S * gl.exp2(d)
        b_e, b_c = factor(f, 2, mma_t), factor(f, 3, mma_t)
        b_o = warpgroup_mma_wait(1, [t_o]) * b_c
        b_U = warpgroup_mma_wait(0, [t_U])
        b_Ue = gl.convert_layout((b_U * b_e).to(dtype), left_k)
        t_S = warpgroup_mma(b_Ue, s_k.index(e), b_S, is_async=True)
        b_Ub = gl.convert_layout(b_U.to(dtype), left)
        t_o = warpgroup_mma(b_Ub, s_P.index(i_l).permute((1, 0)), b_o, is_async=True)
        tma.store_wait(0)
        barrier()
        b_S = warpgroup_mma_wait(1, [t_S])
        b_h = b_S.to(dtype)
        b_o = warpgroup_mma_wait(0, [t_o])
        b_y = b_o.to(dtype)
        s_o.permute((1, 0)).store(b_y)
        if LATE == 1:
            barrier()
            mbarrier.arrive(free_l.index(i_l))
        row_y = row
        row += 64
        d = g_next

    n = n_tokens - (NT - 1) * 64
    if n < 64:
        o_t = gl.arange(0, 64, gl.SliceLayout(0, mma_t))
        o_r = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, mma_t)), 1)
        p_o = o + row_y.to(gl.int64) * (H * V) + c_v
        gl.store(
            p_o + (o_r + gl.expand_dims(o_t, 0) * (H * V)), b_y, mask=gl.expand_dims(o_t < n, 0)
        )
    else:
        fence_async_shared()
        barrier()
        tma.async_copy_shared_to_global(o_desc, [row_y, c_v], s_o)
    tma.store_wait(0)
    if WRITE_STATE:
        if (index >= 0) & (n <= 64):
            gl.store(p_state + o_vk, b_S.to(state.dtype.element_ty))


@gluon.jit(
    do_not_specialize=["T", "G"],
    do_not_specialize_on_alignment=["cu_seqlens", "state_indices", "track_chunks"],
)
def state_kernel_sm90(
    q, k, v, blocks, factors, o_desc, gates, o, h, state, state_indices, starts, track,
    track_chunks, cu_seqlens, T, G, s_state,
    H: gl.constexpr, Hg: gl.constexpr, K: gl.constexpr, V: gl.constexpr, HALVES: gl.constexpr,
    EARLY: gl.constexpr, LATE: gl.constexpr, VARLEN: gl.constexpr, HAS_STATE: gl.constexpr,
    HAS_INDICES: gl.constexpr, HAS_STARTS: gl.constexpr, WRITE_STATE: gl.constexpr,
    STORE_H: gl.constexpr, TRACK: gl.constexpr,
):  # fmt: skip
    """As prefill_state.state_kernel: the same arithmetic, other instructions.

    One program: 64 HALVES rows of the state of one value head through one segment of a sequence; a
    warpgroup for each 64 and one warp that copies. Tensor descriptors (bfloat16 or float16 unless
    said): q and k [T, Hg K] in tiles of [64, K], v and o_desc [T, H V] of [64, 64], blocks
    [slots H 128, 64] of [64, 64], factors float32 [slots H 384] of [256], whose memory is gates.
    EARLY and LATE are the copies in flight of (k, v, Ai, factors) and of (q, P).
    """
    dtype: gl.constexpr = k.dtype
    i_v, i_h, i_ns = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    i_n = i_ns // G
    bos, n_tokens, slot = locate(cu_seqlens, i_n, T, VARLEN)
    i_t0, NT = segment_chunks(i_ns % G, n_tokens, G)
    if NT <= 0:
        return
    first = i_n * ((T + 63) // 64) + i_t0
    if STORE_H and VARLEN:
        first = i_t0
        for i in range(i_n):
            n = gl.load(cu_seqlens + i + 1) - gl.load(cu_seqlens + i)
            first += (n.to(gl.int32) + 63) // 64
    i_track = 0
    if TRACK:
        i_track = gl.load(track_chunks + i_n).to(gl.int32) - i_t0
    index = i_n.to(gl.int64)
    if HAS_INDICES:
        index = gl.load(state_indices + i_n).to(gl.int64)

    s_k = gl.allocate_shared_memory(dtype, [EARLY, 64, K], k.layout)
    s_v = gl.allocate_shared_memory(dtype, [EARLY * HALVES, 64, 64], v.layout)
    s_A = gl.allocate_shared_memory(dtype, [EARLY, 64, 64], blocks.layout)
    s_f = gl.allocate_shared_memory(gl.float32, [EARLY, 256], factors.layout)
    s_q = gl.allocate_shared_memory(dtype, [LATE, 64, K], q.layout)
    s_P = gl.allocate_shared_memory(dtype, [LATE, 64, 64], blocks.layout)
    s_o = gl.allocate_shared_memory(dtype, [HALVES, 64, 64], o_desc.layout)
    full_e, free_e = stage_barriers(EARLY, HALVES)
    full_l, free_l = stage_barriers(LATE, HALVES)
    fence_async_shared()
    barrier()

    row = bos + i_t0 * 64
    n_tokens -= i_t0 * 64
    tile = (slot + i_t0) * H + i_h
    c_k = i_h // (H // Hg) * K
    c_v = i_h * V + i_v * (HALVES * 64)
    if HALVES == 1:
        gl.warp_specialize([
            (run_chunks, (
                o_desc, gates, o, h, state, starts, track, s_q, s_k, s_v, s_A, s_P, s_f, s_o,
                full_e, free_e, full_l, free_l, index, s_state, row, n_tokens, tile, first,
                i_track, NT, i_n, i_ns, i_h, i_v, H, K, V, EARLY, LATE, HALVES, HAS_STATE,
                HAS_STARTS, WRITE_STATE, STORE_H, TRACK, 0,
            )),
            (load_tiles, (
                q, k, v, blocks, factors, s_q, s_k, s_v, s_A, s_P, s_f, full_e, free_e, full_l,
                free_l, row, tile, NT, c_k, c_v, H, EARLY, LATE, HALVES,
            )),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (run_chunks, (
                o_desc, gates, o, h, state, starts, track, s_q, s_k, s_v, s_A, s_P, s_f, s_o,
                full_e, free_e, full_l, free_l, index, s_state, row, n_tokens, tile, first,
                i_track, NT, i_n, i_ns, i_h, i_v, H, K, V, EARLY, LATE, HALVES, HAS_STATE,
                HAS_STARTS, WRITE_STATE, STORE_H, TRACK, 0,
            )),
            (run_chunks, (
                o_desc, gates, o, h, state, starts, track, s_q, s_k, s_v, s_A, s_P, s_f, s_o,
                full_e, free_e, full_l, free_l, index, s_state, row, n_tokens, tile, first,
                i_track, NT, i_n, i_ns, i_h, i_v, H, K, V, EARLY, LATE, HALVES, HAS_STATE,
                HAS_STARTS, WRITE_STATE, STORE_H, TRACK, 1,
            )),
            (load_tiles, (
                q, k, v, blocks, factors, s_q, s_k, s_v, s_A, s_P, s_f, full_e, free_e, full_l,
                free_l, row, tile, NT, c_k, c_v, H, EARLY, LATE, HALVES,
            )),
        ], [4, 1], [240, 24])  # fmt: skip
