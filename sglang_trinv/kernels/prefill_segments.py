"""A long sequence in segments: what each does to any state, and from it the state before each.

The state pass is linear in the state: over one segment S <- S M + L, exactly. So all segments run
at once, and only these small products remain one after the other.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang_trinv.kernels.prefill_state import locate_sequence, segment


@triton.jit(do_not_specialize=["T", "G"], do_not_specialize_on_alignment=["cu_seqlens"])
def transfer_kernel(
    k, v, inverses, factors, ends, cu_seqlens, T, G, s_k, s_v,
    H: tl.constexpr, Hg: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    IO: tl.constexpr, STAGES: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """ends[n, s] = [L; M] of the first G - 1 segments of each sequence, float32 [., H, V + K, K].

    The recurrence of prefill_state.state_kernel without output, from a state of zeros (rows of L)
    and from the identity without values (rows of M). One program: BV rows; other layouts as there.
    The last segment's is not written: no state is wanted behind it.
    """
    i_v, i_h, i_ns = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_n = i_ns // (G - 1)
    bos, n_tokens, slot = locate_sequence(cu_seqlens, i_n, T, VARLEN)
    i_t0, i_t1 = segment(i_ns % (G - 1), n_tokens, G)
    if i_t1 * 64 >= n_tokens:
        return
    dtype = k.dtype.element_ty
    o_t, o_v, o_k = tl.arange(0, 64), i_v * BV + tl.arange(0, BV), tl.arange(0, K)
    b_S = tl.where(o_v[:, None] - V == o_k[None, :], 1.0, 0.0)
    one = tl.full([], 1, tl.int64)
    tile = one * slot * H + i_h
    p_k = k + one * bos * s_k + i_h // (H // Hg) * K + o_t[:, None] * s_k + o_k[None, :]
    p_v = v + one * bos * s_v + i_h * V + o_t[:, None] * s_v + o_v[None, :]
    p_A = inverses + tile * 4096 + o_t[:, None] * 64 + o_t[None, :]
    p_f = factors + tile * 384
    for i_t in tl.range(i_t0, i_t1, num_stages=STAGES):
        i_r = one * (i_t * 64)
        i_c = one * (i_t * H)
        b_k = tl.load(p_k + i_r * s_k).to(IO)
        b_v = tl.load(p_v + i_r * s_v, mask=(o_v < V)[None, :], other=0.0)
        b_A = tl.load(p_A + i_c * 4096).to(IO)
        b_a = tl.load(p_f + i_c * 384 + o_t)
        b_b = tl.load(p_f + i_c * 384 + 64 + o_t)
        b_e = tl.load(p_f + i_c * 384 + 128 + o_t)
        d = tl.exp2(tl.load(p_f + i_c * 384 + 319))
        b_D = tl.dot(b_S.to(dtype).to(IO), tl.trans(b_k))
        b_D = tl.trans(b_v).to(tl.float32) * b_b[None, :] - b_D * b_a[None, :]
        b_U = tl.dot(b_D.to(dtype).to(IO), tl.trans(b_A))
        b_S = tl.dot((b_U * b_e[None, :]).to(dtype).to(IO), b_k, b_S * d)
    p_e = ends + (one * i_ns * H + i_h) * ((V + K) * K)
    tl.store(p_e + o_v[:, None] * K + o_k[None, :], b_S)


@triton.jit(
    do_not_specialize=["T", "G"], do_not_specialize_on_alignment=["cu_seqlens", "state_indices"]
)
def combine_kernel(
    ends, starts, state, state_indices, cu_seqlens, T, G, s_state,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    VARLEN: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INDICES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """starts[n, 0] = state; starts[n, s + 1] = starts[n, s] M_s + L_s, float32 [N G, H, V, K].

    One program: BV rows of the state of one value head through all segments of a sequence. Nothing
    is written for segments without chunks. With EARLY the kernel before may still run.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    i_v, i_h, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, n_tokens, _ = locate_sequence(cu_seqlens, i_n, T, VARLEN)
    if n_tokens <= 0:
        return
    o_k = tl.arange(0, K)
    o_vk = (i_v * BV + tl.arange(0, BV))[:, None] * K + o_k[None, :]
    index = i_n.to(tl.int64)
    if HAS_INDICES:
        index = tl.load(state_indices + i_n).to(tl.int64)
    b_S = tl.zeros([BV, K], tl.float32)
    if HAS_STATE:
        p_state = state + index * s_state + i_h * (V * K) + o_vk
        b_S = tl.load(p_state, mask=(index >= 0) & (o_vk >= 0), other=0.0).to(tl.float32)
    one = tl.full([], 1, tl.int64)
    p_s = starts + (one * i_n * G * H + i_h) * (V * K) + o_vk
    p_e = ends + (one * i_n * (G - 1) * H + i_h) * ((V + K) * K)
    tl.store(p_s, b_S)
    _, i_t1 = segment(0, n_tokens, G)
    NT = (n_tokens + 63) // 64
    for i_s in range(0, (NT - 1) // i_t1):
        p = p_e + one * i_s * H * ((V + K) * K)
        b_M = tl.load(p + V * K + o_k[:, None] * K + o_k[None, :])
        b_S = tl.dot(b_S, b_M, tl.load(p + o_vk), input_precision=DOT)
        tl.store(p_s + one * (i_s + 1) * H * (V * K), b_S)
