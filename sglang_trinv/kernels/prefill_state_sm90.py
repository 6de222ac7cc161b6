"""The state pass for Hopper, in Gluon: TMA, asynchronous wgmma, operands kept in registers.

With OWN_SCORES one more warpgroup computes the scores, which then never are in global memory. It
delays the others: where memory is not what limits, scores_kernel before is faster.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from sglang_trinv.kernels.prefill_scores_sm90 import score_items
from sglang_trinv.kernels.prefill_tiles_sm90 import (
    PLACES,
    barrier,
    chunk_factors,
    clear_rows,
    factor,
    last_gate,
    load_tiles,
    put_place,
    read_place,
    scale_values,
    stage_barriers,
    store_rows,
)

# A row that no tensor has. Hopper traps a store at a negative coordinate.
PAST_END = gl.constexpr(1 << 30)


@gluon.jit
def run_item(
    o_desc, o, h, state, starts, track, track_chunks, cu_seqlens, s_q, s_k, s_v, s_A, s_P,
    s_f, s_o, full, full_P, free, T, G, s_state, item, i_t0, row, n_tokens, NT, index, past,
    H: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
    VARLEN: gl.constexpr, HAS_STATE: gl.constexpr, HAS_STARTS: gl.constexpr,
    WRITE_STATE: gl.constexpr, STORE_H: gl.constexpr, TRACK: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows of the transposed state, in two halves of K, through NT chunks.

    ``past``: chunks of the items before, which took their turns of the stages.

    The recurrence is X (state times keys), D, U (D times Ai), the new state: what the outputs need
    is issued behind each of these products, so that the tensor cores have work while the next
    operand is computed. The compiler waits for all products in flight before it writes to shared
    memory: so a chunk's output goes there when none are, and on from there in the next chunk.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    dtype: gl.constexpr = s_k.dtype
    K: gl.constexpr = 128
    PARTS: gl.constexpr = V // (HALVES * 64)
    i_v, i_h, i_ns = item % PARTS, item // PARTS % H, item // (PARTS * H)
    i_n = i_ns // G
    c_v = i_h * V + (i_v * HALVES + HALF) * 64
    o_v = (i_v * HALVES + HALF) * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma))
    o_vk = gl.expand_dims(o_v, 1) * K + gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, mma)), 0)
    if HAS_STATE:
        p_state = state + index.to(gl.int64) * s_state + i_h * (V * K)
    first = i_n * ((T + 63) // 64) + i_t0
    if STORE_H and VARLEN:
        first = i_t0
        for i in range(i_n):
            n = gl.load(cu_seqlens + i + 1) - gl.load(cu_seqlens + i)
            first += (n.to(gl.int32) + 63) // 64
    i_track = 0
    if TRACK:
        i_track = gl.load(track_chunks + i_n).to(gl.int32) - i_t0
    zeros = gl.zeros([64, 64], gl.float32, mma)
    b_S0, b_S1 = zeros, zeros
    if HAS_STARTS:
        p_s = starts + (i_ns.to(gl.int64) * H + i_h) * (V * K) + o_vk
        b_S0, b_S1 = gl.load(p_s), gl.load(p_s + 64)
    elif HAS_STATE:
        if index >= 0:
            b_S0 = gl.load(p_state + o_vk).to(gl.float32)
            b_S1 = gl.load(p_state + o_vk + 64).to(gl.float32)
    row_y = row * 0 + PAST_END  # the first copy, of no output yet, writes nothing
    s_o = s_o.index(HALF)
    t_o = warpgroup_mma_init(zeros)
    mbarrier.wait(full.index(past % STAGES), (past // STAGES) & 1)

    for i_t in range(NT):
        x = past + i_t
        e = x % STAGES
        s_ke, s_ve, s_fe = s_k.index(e), s_v.index(e * HALVES + HALF), chunk_factors(s_f.index(e))
        s_k0, s_k1 = s_ke.slice(0, 64, 1), s_ke.slice(64, 64, 1)
        s_q0, s_q1 = s_q.index(e * 2), s_q.index(e * 2 + 1)
        b_h0 = b_S0.to(dtype)
        b_h1 = b_S1.to(dtype)
        if STORE_H:
            p_h = h + ((first + i_t).to(gl.int64) * H + i_h) * (V * K) + o_vk
            gl.store(p_h, b_h0)
            gl.store(p_h + 64, b_h1)
        if TRACK:
            if i_t == i_track:
                p_t = track + (i_n.to(gl.int64) * H + i_h) * (V * K) + o_vk
                gl.store(p_t, b_S0)
                gl.store(p_t + 64, b_S1)
        b_h = gl.convert_layout(gl.join(b_h0, b_h1).permute((0, 2, 1)).reshape((64, 128)), left)
        b_h0 = gl.convert_layout(b_h0, left)
        b_h1 = gl.convert_layout(b_h1, left)
        b_o = warpgroup_mma_wait(0, [t_o])
        s_o.permute((1, 0)).store(b_o.to(dtype))
        n = n_tokens - i_t * 64
        if n < 64:
            clear_rows(s_ke, n)
            clear_rows(s_q0, n)
            clear_rows(s_q1, n)
            clear_rows(s_ve, n)
            fence_async_shared()
            barrier()
        b_v, b_b = s_ve.permute((1, 0)).load(mma), factor(s_fe, 1, mma)
        b_a = factor(s_fe, 0, mma)
        t_X = warpgroup_mma(b_h, s_ke.permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_v = scale_values(b_v, b_b)
        mbarrier.wait(full_P.index(e), (x // STAGES) & 1)
        b_d = last_gate(s_fe, mma)
        t_o = warpgroup_mma(b_h0, s_q0.permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_S0 = b_S0 * b_d
        b_S1 = b_S1 * b_d
        b_X = warpgroup_mma_wait(1, [t_X])
        b_e, b_c = factor(s_fe, 2, mma), factor(s_fe, 3, mma)
        fence_async_shared()
        b_D = gl.convert_layout((b_v - b_X * b_a).to(dtype), left)
        barrier()
        t_U = warpgroup_mma(b_D, s_A.index(e).permute((1, 0)), zeros, use_acc=False, is_async=True)
        t_o = warpgroup_mma(b_h1, s_q1.permute((1, 0)), t_o, is_async=True)
        tma.async_copy_shared_to_global(o_desc, [row_y, c_v], s_o)
        mbarrier.arrive(free.index((x + STAGES - 1) % STAGES), pred=i_t > 0)
        b_U = warpgroup_mma_wait(1, [t_U])
        b_Ue = gl.convert_layout((b_U * b_e).to(dtype), left)
        t_S0 = warpgroup_mma(b_Ue, s_k0, b_S0, is_async=True)
        t_S1 = warpgroup_mma(b_Ue, s_k1, b_S1, is_async=True)
        b_U = gl.convert_layout(b_U.to(dtype), left)
        b_o = warpgroup_mma_wait(2, [t_o]) * b_c
        t_o = warpgroup_mma(b_U, s_P.index(e).permute((1, 0)), b_o, is_async=True)
        x += 1
        mbarrier.wait(full.index(x % STAGES), (x // STAGES) & 1, pred=i_t + 1 < NT)
        tma.store_wait(0)
        barrier()
        if HALVES == 1:
            b_S0, b_S1 = warpgroup_mma_wait(1, [t_S0, t_S1])
        else:  # two warpgroups have too few registers to leave one in flight
            b_S0, b_S1, b_o = warpgroup_mma_wait(0, [t_S0, t_S1, t_o])
            t_o = warpgroup_mma_init(b_o)
        row_y = row
        row += 64

    b_o = warpgroup_mma_wait(0, [t_o])
    s_o.permute((1, 0)).store(b_o.to(dtype))
    fence_async_shared()
    barrier()
    mbarrier.arrive(free.index((past + NT - 1) % STAGES))
    n = n_tokens - (NT - 1) * 64
    if n < 64:
        store_rows(o + row_y.to(gl.int64) * (H * V) + c_v, H * V, s_o, n)
    else:
        tma.async_copy_shared_to_global(o_desc, [row_y, c_v], s_o)
    if WRITE_STATE:
        if (index >= 0) & (n <= 64):
            gl.store(p_state + o_vk, b_S0.to(state.dtype.element_ty))
            gl.store(p_state + o_vk + 64, b_S1.to(state.dtype.element_ty))
    tma.store_wait(0)
    barrier()


@gluon.jit
def run_items(
    o_desc, o, h, state, starts, track, track_chunks, cu_seqlens, s_q, s_k, s_v, s_A, s_P,
    s_f, s_o, s_m, full, full_P, free, T, G, items, s_state,
    H: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
    VARLEN: gl.constexpr, HAS_STATE: gl.constexpr, HAS_STARTS: gl.constexpr,
    WRITE_STATE: gl.constexpr, STORE_H: gl.constexpr, TRACK: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its 64 rows of item after item."""
    past, n = 0, 0
    item, i_t0, row, left, _, NT, index = read_place(s_m, n)
    while item < items:
        run_item(
            o_desc, o, h, state, starts, track, track_chunks, cu_seqlens, s_q, s_k, s_v, s_A,
            s_P, s_f, s_o, full, full_P, free, T, G, s_state, item, i_t0, row, left, NT, index,
            past, H, V, STAGES, HALVES, VARLEN, HAS_STATE, HAS_STARTS, WRITE_STATE, STORE_H, TRACK,
            HALF,
        )  # fmt: skip
        past += NT
        n += 1
        item, i_t0, row, left, _, NT, index = read_place(s_m, n)


@gluon.jit
def share_out(
    half_0, half_1, scores, tiles, HALVES: gl.constexpr, OWN_SCORES: gl.constexpr,
    CHUNKS_REGS: gl.constexpr, SCORES_REGS: gl.constexpr,
):  # fmt: skip
    """Run each part with its arguments: a warpgroup each, with so many registers a thread."""
    if HALVES == 2 and OWN_SCORES:
        gl.warp_specialize(
            [
                (run_items, half_0), (run_items, half_1), (score_items, scores),
                (load_tiles, tiles),
            ],
            [4, 4, 1], [CHUNKS_REGS, SCORES_REGS, 24],
        )  # fmt: skip
    elif HALVES == 2:
        gl.warp_specialize(
            [(run_items, half_0), (run_items, half_1), (load_tiles, tiles)],
            [4, 1], [CHUNKS_REGS, 24],
        )  # fmt: skip
    elif OWN_SCORES:
        gl.warp_specialize(
            [(run_items, half_0), (score_items, scores), (load_tiles, tiles)],
            [4, 1], [SCORES_REGS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize([(run_items, half_0), (load_tiles, tiles)], [1], [24])


@gluon.jit(
    do_not_specialize=["T", "G", "items"],
    do_not_specialize_on_alignment=["cu_seqlens", "state_indices", "track_chunks"],
)
def state_kernel_sm90(
    q, k, v, inverses, scores, factors, o_desc, o, h, state, state_indices, starts, track,
    track_chunks, marks, cu_seqlens, scale, T, G, items, s_state,
    H: gl.constexpr, Hg: gl.constexpr, K: gl.constexpr, V: gl.constexpr, HALVES: gl.constexpr,
    STAGES: gl.constexpr, VARLEN: gl.constexpr, HAS_STATE: gl.constexpr,
    HAS_INDICES: gl.constexpr, HAS_STARTS: gl.constexpr, WRITE_STATE: gl.constexpr,
    STORE_H: gl.constexpr, TRACK: gl.constexpr, NORM: gl.constexpr, OWN_SCORES: gl.constexpr,
    CHUNKS_REGS: gl.constexpr, SCORES_REGS: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """As prefill_state.state_kernel: the same arithmetic, other instructions.

    One item: 64 HALVES rows of the state of one value head through one segment of a sequence. A
    program takes item after item, first its own number, then the one that marks[0] (int32, 0 at
    first) counts, with a warpgroup for each 64 rows, one for the scores with OWN_SCORES, and one
    warp that copies, ahead into the next item. With BESIDE the scores are computed meanwhile: see
    scores_kernel for the other marks. Tensor descriptors (bfloat16 or float16 unless said) in tiles
    of [64, 64]: q and k [T, Hg K], v and o_desc [T, H V], inverses and scores [slots H 64, 64]; in
    tiles of [8, 64]: factors, float32 [slots H 6, 64]. STAGES is the number of copies in flight.
    """
    dtype: gl.constexpr = k.dtype
    s_k = gl.allocate_shared_memory(dtype, [STAGES, 64, 128], k.layout)
    s_v = gl.allocate_shared_memory(dtype, [STAGES * HALVES, 64, 64], v.layout)
    s_A = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], inverses.layout)
    s_f = gl.allocate_shared_memory(gl.float32, [STAGES, 8, 64], factors.layout)
    s_q = gl.allocate_shared_memory(dtype, [STAGES * 2, 64, 64], q.layout)
    s_P = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], inverses.layout)
    s_o = gl.allocate_shared_memory(dtype, [HALVES, 64, 64], o_desc.layout)
    full, full_P = stage_barriers(STAGES, 1), stage_barriers(STAGES, 1)
    free = stage_barriers(STAGES, HALVES)
    PARTS: gl.constexpr = V // (HALVES * 64)
    if not BESIDE:
        gdc_wait()
    s_m = gl.allocate_shared_memory(gl.int32, [PLACES, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    put_place(
        s_m, 0, gl.program_id(0), marks, cu_seqlens, state_indices, T, G, items, H, PARTS, VARLEN,
        HAS_INDICES,
    )  # fmt: skip
    fence_async_shared()
    barrier()

    share_out(
        (
            o_desc, o, h, state, starts, track, track_chunks, cu_seqlens, s_q, s_k, s_v, s_A,
            s_P, s_f, s_o, s_m, full, full_P, free, T, G, items, s_state, H, V, STAGES, HALVES,
            VARLEN, HAS_STATE, HAS_STARTS, WRITE_STATE, STORE_H, TRACK, 0,
        ),
        (
            o_desc, o, h, state, starts, track, track_chunks, cu_seqlens, s_q, s_k, s_v, s_A,
            s_P, s_f, s_o, s_m, full, full_P, free, T, G, items, s_state, H, V, STAGES, HALVES,
            VARLEN, HAS_STATE, HAS_STARTS, WRITE_STATE, STORE_H, TRACK, 1,
        ),
        (s_q, s_k, s_P, s_f, s_m, full, full_P, scale, items, STAGES, NORM, 64 // HALVES),
        (
            q, k, v, inverses, scores, factors, state, state_indices, starts, marks, cu_seqlens,
            s_q, s_k, s_v, s_A, s_P, s_f, s_m, full, full_P, free, T, G, items, s_state,
            H, Hg, V, STAGES, HALVES, VARLEN, HAS_STATE, HAS_INDICES, HAS_STARTS, OWN_SCORES,
            BESIDE,
        ),
        HALVES, OWN_SCORES, CHUNKS_REGS, SCORES_REGS,
    )  # fmt: skip
