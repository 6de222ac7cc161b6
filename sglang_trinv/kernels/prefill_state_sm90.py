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
def factor(s, ROW: gl.constexpr, layout: gl.constexpr):
    return gl.expand_dims(s.slice(ROW * 64, 64).load(gl.SliceLayout(0, layout)), 0)


@gluon.jit
def store_tile(s_o, o_desc, b_o, row, c_v):
    tma.store_wait(0)
    barrier()
    s_o.permute((1, 0)).store(b_o)
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(o_desc, [row, c_v], s_o)


@gluon.jit
def load_tiles(
    q, k, v, Ai, P, factors, s_q, s_k, s_v, s_A, s_P, s_f, full_e, free_e, full_l, free_l,
    bos, tile, NT, c_k, c_v, H: gl.constexpr, EARLY: gl.constexpr, LATE: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    """One warp: copy chunk after chunk into shared memory, as far ahead as there is room."""
    early: gl.constexpr = (
        k.block_type.nbytes + HALVES * v.block_type.nbytes + Ai.block_type.nbytes
        + factors.block_type.nbytes
    )  # fmt: skip
    late: gl.constexpr = q.block_type.nbytes + P.block_type.nbytes
    for i_t in range(NT):
        row = bos + i_t * 64
        t = tile + i_t * H
        e = i_t % EARLY
        bar = full_e.index(e)
        mbarrier.wait(free_e.index(e), ((i_t // EARLY) & 1) ^ 1)
        mbarrier.expect(bar, early)
        tma.async_copy_global_to_shared(k, [row, c_k], bar, s_k.index(e))
        tma.async_copy_global_to_shared(factors, [t * 256], bar, s_f.index(e))
        for i in gl.static_range(HALVES):
            tma.async_copy_global_to_shared(v, [row, c_v + i * 64], bar, s_v.index(e * HALVES + i))
        tma.async_copy_global_to_shared(Ai, [t * 64, 0], bar, s_A.index(e))
        i_l = i_t % LATE
        bar = full_l.index(i_l)
        mbarrier.wait(free_l.index(i_l), ((i_t // LATE) & 1) ^ 1)
        mbarrier.expect(bar, late)
        tma.async_copy_global_to_shared(q, [row, c_k], bar, s_q.index(i_l))
        tma.async_copy_global_to_shared(P, [t * 64, 0], bar, s_P.index(i_l))


@gluon.jit
def run_chunks(
    o_desc, decay, o, h, state, track, s_q, s_k, s_v, s_A, s_P, s_f, s_o, full_e, free_e,
    full_l, free_l, index, s_state, bos, n_tokens, tile, first, i_track, NT, i_n, i_h, i_v,
    H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, EARLY: gl.constexpr, LATE: gl.constexpr,
    HALVES: gl.constexpr, HAS_STATE: gl.constexpr, WRITE_STATE: gl.constexpr,
    STORE_H: gl.constexpr, TRACK: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows of the transposed state through all chunks of a sequence."""
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
    if HAS_STATE:
        if index >= 0:
            b_S = gl.load(p_state + o_vk).to(gl.float32)
    zeros = gl.zeros([64, 64], gl.float32, mma_t)
    b_o = zeros
    b_h = b_S.to(dtype)
    d = gl.load(decay + tile)
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
        if i_t > 0:
            store_tile(s_o, o_desc, b_o.to(dtype), bos + i_t * 64 - 64, c_v)
        f = s_f.index(e)
        b_b = factor(f, 1, mma_t)
        b_v = s_v.index(e * HALVES + HALF).permute((1, 0)).load(mma_t).to(gl.float32) * b_b
        b_a = factor(f, 0, mma_t) * b_b
        d_next = gl.load(decay + tile + (i_t + 1) * H, mask=i_t + 1 < NT, other=0.0)
        b_X = warpgroup_mma_wait(1, [t_X])
        b_D = gl.convert_layout((b_v - b_X * b_a).to(dtype), left)
        t_U = warpgroup_mma(b_D, s_A.index(e).permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_S = b_S * d
        b_e, b_c = factor(f, 2, mma_t), factor(f, 3, mma_t)
        b_o = warpgroup_mma_wait(1, [t_o]) * b_c
        b_U = warpgroup_mma_wait(0, [t_U])
        b_Ue = gl.convert_layout((b_U * b_e).to(dtype), left_k)
        t_S = warpgroup_mma(b_Ue, s_k.index(e), b_S, is_async=True)
        b_Ub = gl.convert_layout(b_U.to(dtype), left)
        t_o = warpgroup_mma(b_Ub, s_P.index(i_l).permute((1, 0)), b_o, is_async=True)
        b_S = warpgroup_mma_wait(1, [t_S])
        barrier()
        mbarrier.arrive(free_e.index(e))
        b_h = b_S.to(dtype)
        b_o = warpgroup_mma_wait(0, [t_o])
        barrier()
        mbarrier.arrive(free_l.index(i_l))
        d = d_next

    row = bos + (NT - 1) * 64
    n = n_tokens - (NT - 1) * 64
    if n < 64:
        o_t = gl.arange(0, 64, gl.SliceLayout(0, mma_t))
        o_r = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, mma_t)), 1)
        p_o = o + row.to(gl.int64) * (H * V) + c_v
        gl.store(
            p_o + (o_r + gl.expand_dims(o_t, 0) * (H * V)),
            b_o.to(dtype),
            mask=gl.expand_dims(o_t < n, 0),
        )
    else:
        store_tile(s_o, o_desc, b_o.to(dtype), row, c_v)
    tma.store_wait(0)
    if WRITE_STATE:
        if index >= 0:
            gl.store(p_state + o_vk, b_S.to(state.dtype.element_ty))


@gluon.jit(do_not_specialize=["T"])
def state_kernel_sm90(
    q, k, v, Ai, P, factors, o_desc, decay, o, h, state, state_indices, track, track_chunks,
    cu_seqlens, T, s_state,
    H: gl.constexpr, Hg: gl.constexpr, K: gl.constexpr, V: gl.constexpr, HALVES: gl.constexpr,
    EARLY: gl.constexpr, LATE: gl.constexpr, VARLEN: gl.constexpr, HAS_STATE: gl.constexpr,
    HAS_INDICES: gl.constexpr, WRITE_STATE: gl.constexpr, STORE_H: gl.constexpr,
    TRACK: gl.constexpr,
):  # fmt: skip
    """As prefill_state.state_kernel: the same arithmetic, other instructions.

    One program: 64 HALVES rows of the state of one value head and sequence; a warpgroup for each 64
    and one warp that copies. Tensor descriptors (bfloat16 or float16 unless said): q and k
    [T, Hg K] in tiles of [64, K], v and o_desc [T, H V] of [64, 64], Ai and P [slots H 64, 64] of
    [64, 64], factors float32 [slots H 256] of [256]. decay float32 [slots, H]; EARLY and LATE are
    the copies in flight of (k, v, Ai, factors) and of (q, P).
    """
    dtype: gl.constexpr = k.dtype
    i_v, i_h, i_n = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    if VARLEN:
        bos = gl.load(cu_seqlens + i_n).to(gl.int32)
        n_tokens = gl.load(cu_seqlens + i_n + 1).to(gl.int32) - bos
        slot = bos // 64 + i_n
    else:
        bos = i_n * T
        n_tokens = T
        slot = i_n * (T // 64 + 1)
    if n_tokens <= 0:
        return
    NT = (n_tokens + 63) // 64
    first = i_n * ((T + 63) // 64)
    if STORE_H and VARLEN:
        first = 0
        for i in range(i_n):
            n = gl.load(cu_seqlens + i + 1) - gl.load(cu_seqlens + i)
            first += (n.to(gl.int32) + 63) // 64
    i_track = 0
    if TRACK:
        i_track = gl.load(track_chunks + i_n).to(gl.int32)
    index = i_n.to(gl.int64)
    if HAS_INDICES:
        index = gl.load(state_indices + i_n).to(gl.int64)

    s_k = gl.allocate_shared_memory(dtype, [EARLY, 64, K], k.layout)
    s_v = gl.allocate_shared_memory(dtype, [EARLY * HALVES, 64, 64], v.layout)
    s_A = gl.allocate_shared_memory(dtype, [EARLY, 64, 64], Ai.layout)
    s_f = gl.allocate_shared_memory(gl.float32, [EARLY, 256], factors.layout)
    s_q = gl.allocate_shared_memory(dtype, [LATE, 64, K], q.layout)
    s_P = gl.allocate_shared_memory(dtype, [LATE, 64, 64], P.layout)
    s_o = gl.allocate_shared_memory(dtype, [HALVES, 64, 64], o_desc.layout)
    full_e = gl.allocate_shared_memory(gl.int64, [EARLY, 1], mbarrier.MBarrierLayout())
    free_e = gl.allocate_shared_memory(gl.int64, [EARLY, 1], mbarrier.MBarrierLayout())
    full_l = gl.allocate_shared_memory(gl.int64, [LATE, 1], mbarrier.MBarrierLayout())
    free_l = gl.allocate_shared_memory(gl.int64, [LATE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(EARLY):
        mbarrier.init(full_e.index(i), count=1)
        mbarrier.init(free_e.index(i), count=HALVES)
    for i in gl.static_range(LATE):
        mbarrier.init(full_l.index(i), count=1)
        mbarrier.init(free_l.index(i), count=HALVES)
    fence_async_shared()
    barrier()

    tile = slot * H + i_h
    c_k = i_h // (H // Hg) * K
    c_v = i_h * V + i_v * (HALVES * 64)
    if HALVES == 1:
        gl.warp_specialize([
            (run_chunks, (
                o_desc, decay, o, h, state, track, s_q, s_k, s_v, s_A, s_P, s_f, s_o, full_e,
                free_e, full_l, free_l, index, s_state, bos, n_tokens, tile, first, i_track, NT,
                i_n, i_h, i_v, H, K, V, EARLY, LATE, HALVES, HAS_STATE, WRITE_STATE, STORE_H,
                TRACK, 0,
            )),
            (load_tiles, (
                q, k, v, Ai, P, factors, s_q, s_k, s_v, s_A, s_P, s_f, full_e, free_e, full_l,
                free_l, bos, tile, NT, c_k, c_v, H, EARLY, LATE, HALVES,
            )),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (run_chunks, (
                o_desc, decay, o, h, state, track, s_q, s_k, s_v, s_A, s_P, s_f, s_o, full_e,
                free_e, full_l, free_l, index, s_state, bos, n_tokens, tile, first, i_track, NT,
                i_n, i_h, i_v, H, K, V, EARLY, LATE, HALVES, HAS_STATE, WRITE_STATE, STORE_H,
                TRACK, 0,
            )),
            (run_chunks, (
                o_desc, decay, o, h, state, track, s_q, s_k, s_v, s_A, s_P, s_f, s_o, full_e,
                free_e, full_l, free_l, index, s_state, bos, n_tokens, tile, first, i_track, NT,
                i_n, i_h, i_v, H, K, V, EARLY, LATE, HALVES, HAS_STATE, WRITE_STATE, STORE_H,
                TRACK, 1,
            )),
            (load_tiles, (
                q, k, v, Ai, P, factors, s_q, s_k, s_v, s_A, s_P, s_f, full_e, free_e, full_l,
                free_l, bos, tile, NT, c_k, c_v, H, EARLY, LATE, HALVES,
            )),
        ], [4, 1], [240, 24])  # fmt: skip
