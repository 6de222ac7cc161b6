"""The sequential part of the Gated DeltaNet prefill: state and output, chunk after chunk."""

import triton
import triton.language as tl


@triton.jit
def locate_sequence(cu_seqlens, i_n, T, VARLEN: tl.constexpr):
    """(first row of the sequence, its tokens, its first slot: see prefill_prepare.locate_slot)."""
    if VARLEN:
        bos = tl.load(cu_seqlens + i_n).to(tl.int32)
        return bos, tl.load(cu_seqlens + i_n + 1).to(tl.int32) - bos, bos // 64 + i_n
    else:
        return i_n * T, T, i_n * (T // 64 + 1)


@triton.jit
def chunks_before(cu_seqlens, i_n, T, VARLEN: tl.constexpr, BN: tl.constexpr):
    """Chunks of all sequences before this one: where its first state goes in h."""
    if VARLEN:
        n = 0
        for i_b in range(0, i_n, BN):
            o_n = i_b + tl.arange(0, BN)
            m_n = o_n < i_n
            b_bos = tl.load(cu_seqlens + o_n, mask=m_n, other=0).to(tl.int32)
            b_eos = tl.load(cu_seqlens + o_n + 1, mask=m_n, other=0).to(tl.int32)
            n += tl.sum((b_eos - b_bos + 63) // 64)
        return n
    else:
        return i_n * ((T + 63) // 64)


@triton.jit
def segment(i_s, n_tokens, G):
    """(first chunk, end) of segment ``i_s`` of the ``G`` of a sequence; none: first >= end."""
    NT = (n_tokens + 63) // 64
    size = (NT + G - 1) // G
    return i_s * size, tl.minimum((i_s + 1) * size, NT)


@triton.jit(
    do_not_specialize=["T", "G"],
    do_not_specialize_on_alignment=["cu_seqlens", "state_indices", "track_chunks"],
)
def state_kernel(
    q, k, v, inverses, scores, factors, o, h, state, state_indices, starts, track, track_chunks,
    cu_seqlens, T, G, s_q, s_k, s_v, s_state,
    H: tl.constexpr, Hg: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    BN: tl.constexpr, IO: tl.constexpr, STAGES: tl.constexpr, VARLEN: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_INDICES: tl.constexpr, HAS_STARTS: tl.constexpr,
    WRITE_STATE: tl.constexpr, STORE_H: tl.constexpr, TRACK: tl.constexpr,
):  # fmt: skip
    """D = beta (v - a S k), U = Ai D, o = c S q + P U, S <- exp(g_last) S + U e k, chunk by chunk.

    a, c and e are the factors of prefill_prepare. One program: BV rows of the state of one value
    head through one of the G segments of a sequence, transposed throughout ([V, K], [V, tokens]),
    so that each product takes what the one before left in registers and reads its other operand
    from shared memory. Layouts: q, k [T, Hg, K] and v [T, H, V] with row strides, o [T, H, V],
    state [slots, H, V, K] with slot stride s_state, starts float32 [N G, H, V, K]: the state before
    each segment (read in place of state), h [chunks, H, V, K]: the state before each chunk, packed
    by sequence; track float32 [N, H, V, K]: the state before chunk track_chunks[n]. A negative
    index reads zeros and writes nothing.
    """
    i_v, i_h, i_ns = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_n = i_ns // G
    bos, n_tokens, slot = locate_sequence(cu_seqlens, i_n, T, VARLEN)
    i_t0, i_t1 = segment(i_ns % G, n_tokens, G)
    if i_t0 >= i_t1:
        return
    dtype = k.dtype.element_ty
    o_t, o_v, o_k = tl.arange(0, 64), i_v * BV + tl.arange(0, BV), tl.arange(0, K)
    o_vk = o_v[:, None] * K + o_k[None, :]
    o_tt = o_t[:, None] * 64 + o_t[None, :]
    index = i_n.to(tl.int64)
    if HAS_INDICES:
        index = tl.load(state_indices + i_n).to(tl.int64)
    p_state = o_vk
    if HAS_STATE:
        p_state = state + index * s_state + i_h * (V * K) + o_vk
    b_S = tl.zeros([BV, K], tl.float32)
    if HAS_STARTS:
        b_S = tl.load(starts + (tl.full([], 1, tl.int64) * i_ns * H + i_h) * (V * K) + o_vk)
    elif HAS_STATE:
        b_S = tl.load(p_state, mask=(index >= 0) & (o_vk >= 0), other=0.0).to(tl.float32)
    i_k = i_h // (H // Hg)
    one = tl.full([], 1, tl.int64)
    o_kk = o_t[:, None] * s_k + o_k[None, :]
    o_qk = o_t[:, None] * s_q + o_k[None, :]
    o_tv = o_t[:, None] * s_v + o_v[None, :]
    o_to = o_t[:, None] * (H * V) + o_v[None, :]
    tile = one * slot * H + i_h
    p_k = k + one * bos * s_k + i_k * K
    p_q = q + one * bos * s_q + i_k * K
    p_v = v + one * bos * s_v + i_h * V
    p_o = o + one * bos * (H * V) + i_h * V
    p_A, p_P, p_f = inverses + tile * 4096, scores + tile * 4096, factors + tile * 384
    i_track = -1
    if TRACK:
        i_track = tl.load(track_chunks + i_n).to(tl.int32)
        p_track = track + (one * i_n * H + i_h) * (V * K)
    if STORE_H:
        first = chunks_before(cu_seqlens, i_n, T, VARLEN, BN)
        p_h = h + (one * first * H + i_h) * (V * K)

    for i_t in tl.range(i_t0, i_t1, num_stages=STAGES):
        m_t = (i_t * 64 + o_t < n_tokens)[:, None]
        i_r = one * (i_t * 64)
        i_c = one * (i_t * H)
        b_k = tl.load(p_k + i_r * s_k + o_kk, mask=m_t, other=0.0).to(IO)
        b_q = tl.load(p_q + i_r * s_q + o_qk, mask=m_t, other=0.0).to(IO)
        b_v = tl.load(p_v + i_r * s_v + o_tv, mask=m_t, other=0.0)
        b_A = tl.load(p_A + i_c * 4096 + o_tt).to(IO)
        b_P = tl.load(p_P + i_c * 4096 + o_tt).to(IO)
        b_a = tl.load(p_f + i_c * 384 + o_t)
        b_b = tl.load(p_f + i_c * 384 + 64 + o_t)
        b_e = tl.load(p_f + i_c * 384 + 128 + o_t)
        b_c = tl.load(p_f + i_c * 384 + 192 + o_t)
        d = tl.exp2(tl.load(p_f + i_c * 384 + 319))
        b_h = b_S.to(dtype)
        if STORE_H:
            tl.store(p_h + i_c * (V * K) + o_vk, b_h)
        if TRACK and i_t == i_track:
            tl.store(p_track + o_vk, b_S)
        b_h = b_h.to(IO)
        b_D = tl.dot(b_h, tl.trans(b_k))
        b_o = tl.dot(b_h, tl.trans(b_q))
        b_D = tl.trans(b_v).to(tl.float32) * b_b[None, :] - b_D * b_a[None, :]
        b_U = tl.dot(b_D.to(dtype).to(IO), tl.trans(b_A))
        b_S = tl.dot((b_U * b_e[None, :]).to(dtype).to(IO), b_k, b_S * d)
        b_o = tl.dot(b_U.to(dtype).to(IO), tl.trans(b_P), b_o * b_c[None, :])
        tl.store(p_o + i_r * (H * V) + o_to, tl.trans(b_o.to(dtype)), mask=m_t)

    if WRITE_STATE:
        m_last = (index >= 0) & (i_t1 * 64 >= n_tokens)
        tl.store(p_state, b_S.to(state.dtype.element_ty), mask=m_last & (o_vk >= 0))
