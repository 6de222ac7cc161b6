"""Item after item of the state pass for Hopper (prefill_state_sm90), by one warpgroup."""

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

from sglang_trinv.kernels.prefill_tiles_sm90 import (
    barrier,
    chunk_factors,
    clear_rows,
    factor,
    last_gate,
    read_place,
    scale_values,
    store_rows,
)

# A row that no tensor has. Hopper traps a store at a negative coordinate.
PAST_END = gl.constexpr(1 << 30)
MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))


@gluon.jit
def state_rows(item, PARTS: gl.constexpr, HALVES: gl.constexpr, HALF: gl.constexpr):
    """Where 64 columns of one warpgroup's 64 rows are in the state of an item's head."""
    o_v = (item % PARTS * HALVES + HALF) * 64 + gl.arange(0, 64, gl.SliceLayout(1, MMA))
    o_k = gl.arange(0, 64, gl.SliceLayout(0, MMA))
    return gl.expand_dims(o_v, 1) * 128 + gl.expand_dims(o_k, 0)


@gluon.jit
def load_state(
    state, starts, item, index, s_state,
    H: gl.constexpr, V: gl.constexpr, HALVES: gl.constexpr, HAS_STATE: gl.constexpr,
    HAS_STARTS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """The rows' state before an item, in two halves of K."""
    PARTS: gl.constexpr = V // (HALVES * 64)
    b_S0 = gl.zeros([64, 64], gl.float32, MMA)
    b_S1 = b_S0
    o_s = state_rows(item, PARTS, HALVES, HALF)
    if HAS_STARTS:
        p_s = starts + (item // PARTS).to(gl.int64) * (V * 128) + o_s
        b_S0, b_S1 = gl.load(p_s), gl.load(p_s + 64)
    elif HAS_STATE:
        if index >= 0:
            p_s = state + index.to(gl.int64) * s_state + item // PARTS % H * (V * 128) + o_s
            b_S0, b_S1 = gl.load(p_s).to(gl.float32), gl.load(p_s + 64).to(gl.float32)
    return b_S0, b_S1


@gluon.jit
def store_state(
    b_S0, b_S1, state, item, index, left, s_state,
    H: gl.constexpr, V: gl.constexpr, HALVES: gl.constexpr, WRITE_STATE: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    """Store it after an item that ends its sequence, with no tokens ``left``."""
    PARTS: gl.constexpr = V // (HALVES * 64)
    o_s = state_rows(item, PARTS, HALVES, HALF)
    if WRITE_STATE:
        if (index >= 0) & (left <= 0):
            p_s = state + index.to(gl.int64) * s_state + item // PARTS % H * (V * 128) + o_s
            gl.store(p_s, b_S0.to(state.dtype.element_ty))
            gl.store(p_s + 64, b_S1.to(state.dtype.element_ty))


@gluon.jit
def run_item(
    b_S0, b_S1, b_o, row_y, c_y, o_desc, o, h, track, track_chunks, cu_seqlens, s_q, s_k, s_v, s_A,
    s_P, s_f, s_o, full, full_P, free, T, G, item, i_t0, row, n_tokens, NT, past,
    H: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
    VARLEN: gl.constexpr, STORE_H: gl.constexpr, TRACK: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows of the transposed state, in two halves of K, through NT chunks.

    ``past``: chunks of the items before, which took their turns of the stages; ``b_o``: the output
    of the last of them, which goes to row_y and c_y.

    The recurrence is X (state times keys), D, U (D times Ai), the new state: what the outputs need
    is issued behind each of these products, so that the tensor cores have work while the next
    operand is computed. The compiler waits for all products in flight before it writes to shared
    memory: so a chunk's output goes there when none are, and on from there in the next chunk.
    """
    left: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    dtype: gl.constexpr = s_k.dtype
    K: gl.constexpr = 128
    PARTS: gl.constexpr = V // (HALVES * 64)
    i_h, i_n = item // PARTS % H, item // (PARTS * H) // G
    c_v = i_h * V + (item % PARTS * HALVES + HALF) * 64
    if STORE_H or TRACK:
        o_vk = state_rows(item, PARTS, HALVES, HALF)
    first = i_n * ((T + 63) // 64) + i_t0
    if STORE_H and VARLEN:
        first = i_t0
        for i in range(i_n):
            n = gl.load(cu_seqlens + i + 1) - gl.load(cu_seqlens + i)
            first += (n.to(gl.int32) + 63) // 64
    i_track = 0
    if TRACK:
        i_track = gl.load(track_chunks + i_n).to(gl.int32) - i_t0
    zeros = gl.zeros([64, 64], gl.float32, MMA)
    t_o = warpgroup_mma_init(b_o)
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
        b_v, b_b = s_ve.permute((1, 0)).load(MMA), factor(s_fe, 1, MMA)
        b_a = factor(s_fe, 0, MMA)
        t_X = warpgroup_mma(b_h, s_ke.permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_v = scale_values(b_v, b_b)
        mbarrier.wait(full_P.index(e), (x // STAGES) & 1)
        b_d = last_gate(s_fe, MMA)
        t_o = warpgroup_mma(b_h0, s_q0.permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_S0 = b_S0 * b_d
        b_S1 = b_S1 * b_d
        b_X = warpgroup_mma_wait(1, [t_X])
        b_e, b_c = factor(s_fe, 2, MMA), factor(s_fe, 3, MMA)
        fence_async_shared()
        b_D = gl.convert_layout((b_v - b_X * b_a).to(dtype), left)
        barrier()
        t_U = warpgroup_mma(b_D, s_A.index(e).permute((1, 0)), zeros, use_acc=False, is_async=True)
        t_o = warpgroup_mma(b_h1, s_q1.permute((1, 0)), t_o, is_async=True)
        tma.async_copy_shared_to_global(o_desc, [row_y, c_y], s_o)
        mbarrier.arrive(free.index((x + STAGES - 1) % STAGES), pred=x > 0)
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
        row_y, c_y = row, c_v
        row += 64

    b_o = warpgroup_mma_wait(0, [t_o])
    n = n_tokens - (NT - 1) * 64
    if n < 64:
        s_o.permute((1, 0)).store(b_o.to(dtype))
        barrier()
        store_rows(o + row_y.to(gl.int64) * (H * V) + c_v, H * V, s_o, n)
        barrier()
        row_y = row * 0 + PAST_END
    return b_S0, b_S1, b_o, row_y, c_y


@gluon.jit
def run_items(
    o_desc, o, h, state, starts, track, track_chunks, cu_seqlens, s_q, s_k, s_v, s_A, s_P,
    s_f, s_o, s_m, full, full_P, free, T, G, items, s_state,
    H: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
    VARLEN: gl.constexpr, HAS_STATE: gl.constexpr, HAS_STARTS: gl.constexpr,
    WRITE_STATE: gl.constexpr, STORE_H: gl.constexpr, TRACK: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its 64 rows of item after item, an item's last output with the next one."""
    s_o = s_o.index(HALF)
    past, n = 0, 0
    item, i_t0, row, left, _, NT, index = read_place(s_m, n)
    b_o = gl.zeros([64, 64], gl.float32, MMA)
    row_y, c_y = row * 0 + PAST_END, row * 0  # the first copy, of no output yet, writes nothing
    while item < items:
        b_S0, b_S1 = load_state(
            state, starts, item, index, s_state, H, V, HALVES, HAS_STATE, HAS_STARTS, HALF
        )  # fmt: skip
        b_S0, b_S1, b_o, row_y, c_y = run_item(
            b_S0, b_S1, b_o, row_y, c_y, o_desc, o, h, track, track_chunks, cu_seqlens, s_q, s_k,
            s_v, s_A, s_P, s_f, s_o, full, full_P, free, T, G, item, i_t0, row, left, NT, past, H,
            V, STAGES, HALVES, VARLEN, STORE_H, TRACK, HALF,
        )  # fmt: skip
        store_state(
            b_S0, b_S1, state, item, index, left - NT * 64, s_state, H, V, HALVES, WRITE_STATE,
            HALF,
        )  # fmt: skip
        past += NT
        n += 1
        item, i_t0, row, left, _, NT, index = read_place(s_m, n)
    s_o.permute((1, 0)).store(b_o.to(s_o.dtype))
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(o_desc, [row_y, c_y], s_o)
    tma.store_wait(0)
