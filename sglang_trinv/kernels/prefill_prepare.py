"""Everything of the Gated DeltaNet prefill that needs no state: inverses, scores and factors."""

import triton
import triton.language as tl

from sglang_trinv.kernels.blocks import add_identity, inv_16, merge_64
from sglang_trinv.kernels.chunks import load_gate, load_rows, store_block_row
from sglang_trinv.kernels.fwd_intra import below_block, diagonal_block, gram_blocks

LOG2E = tl.constexpr(1.4426950408889634)
L2NORM_EPS = tl.constexpr(1e-6)  # as SGLang's l2norm_fwd


@triton.jit
def locate_slot(cu_seqlens, i_s, N, VARLEN: tl.constexpr, T, BN: tl.constexpr):
    """(first row of the chunk in slot ``i_s`` as int64, tokens from there to the sequence's end).

    Chunk c of sequence n has slot ``cu_seqlens[n] // 64 + n + c``: a closed form, another one for
    each chunk, so that nothing is summed over the batch. The second result is <= 0 where a slot is
    not used.
    """
    if VARLEN:
        i_n = -1
        for i_b in range(0, N, BN):
            o_n = i_b + tl.arange(0, BN)
            b_bos = tl.load(cu_seqlens + o_n, mask=o_n < N, other=0).to(tl.int32)
            i_n += tl.sum(((b_bos // 64 + o_n <= i_s) & (o_n < N)).to(tl.int32))
        bos = tl.load(cu_seqlens + i_n).to(tl.int32)
        n = tl.load(cu_seqlens + i_n + 1).to(tl.int32) - bos
        i_t = i_s - bos // 64 - i_n
    else:
        per_row = T // 64 + 1
        bos = i_s // per_row * T
        n = T
        i_t = i_s % per_row
    return bos.to(tl.int64) + i_t * 64, n - i_t * 64


@triton.jit
def inverse_length(b_G, AXIS: tl.constexpr, NORM: tl.constexpr):
    """1 / sqrt(diagonal + eps) of a Gram block: the factor that normalises its rows."""
    o_i = tl.arange(0, 16)
    b_d = tl.sum(tl.where(o_i[:, None] == o_i[None, :], b_G, 0.0), AXIS)
    return length_factor(b_d, NORM)


@triton.jit
def length_factor(b_d, NORM: tl.constexpr):
    return tl.rsqrt(b_d + L2NORM_EPS) if NORM else tl.full(b_d.shape, 1.0, tl.float32)


@triton.jit
def square_sum(b_x):
    b_x = b_x.to(tl.float32)
    return tl.sum(b_x * b_x, 1)


@triton.jit
def summed_gates(p_g, H, T):
    """The log2 decay of 64 tokens summed from the first, in four parts, and the total."""
    o_t = tl.arange(0, 16)
    b_g0 = tl.cumsum(load_gate(p_g, H, o_t, T, True) * LOG2E, 0)
    g_1 = tl.sum(tl.where(o_t == 15, b_g0, 0.0), 0)
    b_g1 = tl.cumsum(load_gate(p_g, H, o_t + 16, T, True) * LOG2E, 0) + g_1
    g_2 = tl.sum(tl.where(o_t == 15, b_g1, 0.0), 0)
    b_g2 = tl.cumsum(load_gate(p_g, H, o_t + 32, T, True) * LOG2E, 0) + g_2
    g_3 = tl.sum(tl.where(o_t == 15, b_g2, 0.0), 0)
    b_g3 = tl.cumsum(load_gate(p_g, H, o_t + 48, T, True) * LOG2E, 0) + g_3
    return b_g0, b_g1, b_g2, b_g3, tl.sum(tl.where(o_t == 15, b_g3, 0.0), 0)


@triton.jit
def store_factors(p, b_0, b_1, b_2, b_3):
    o_t = tl.arange(0, 16)
    tl.store(p + o_t, b_0)
    tl.store(p + 16 + o_t, b_1)
    tl.store(p + 32 + o_t, b_2)
    tl.store(p + 48 + o_t, b_3)


@triton.jit
def key_factors(p, T, g_last, b_g0, b_g1, b_g2, b_g3, b_r0, b_r1, b_r2, b_r3):
    """Rows 0 and 2 of the factor tile: exp(g_j) r_j, exp(g_last - g_j) r_j; zero past the end."""
    o_t = tl.arange(0, 16)
    b_r0, b_r1 = tl.where(o_t < T, b_r0, 0.0), tl.where(o_t + 16 < T, b_r1, 0.0)
    b_r2, b_r3 = tl.where(o_t + 32 < T, b_r2, 0.0), tl.where(o_t + 48 < T, b_r3, 0.0)
    store_factors(
        p, b_r0 * tl.exp2(b_g0), b_r1 * tl.exp2(b_g1), b_r2 * tl.exp2(b_g2), b_r3 * tl.exp2(b_g3)
    )
    store_factors(
        p + 128, b_r0 * tl.exp2(g_last - b_g0), b_r1 * tl.exp2(g_last - b_g1),
        b_r2 * tl.exp2(g_last - b_g2), b_r3 * tl.exp2(g_last - b_g3),
    )  # fmt: skip


@triton.jit
def inverse_of_keys(
    p_k, s_k, g, beta, Ai, factors, decay, i_s, i_h0, row, T, H: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, IO: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Ai and the key's factors for GROUP value heads of one key head."""
    o_t = tl.arange(0, 16)
    G00, G10, G11, G20, G21, G22, G30, G31, G32, G33 = gram_blocks(p_k, s_k, o_t, T, K, BK, IO)
    b_r0, b_c0 = inverse_length(G00, 1, NORM), inverse_length(G00, 0, NORM)
    b_r1, b_c1 = inverse_length(G11, 1, NORM), inverse_length(G11, 0, NORM)
    b_r2, b_c2 = inverse_length(G22, 1, NORM), inverse_length(G22, 0, NORM)
    b_r3, b_c3 = inverse_length(G33, 1, NORM), inverse_length(G33, 0, NORM)
    G00 *= b_c0[None, :] * b_r0[:, None]
    G10 *= b_c0[None, :] * b_r1[:, None]
    G20 *= b_c0[None, :] * b_r2[:, None]
    G30 *= b_c0[None, :] * b_r3[:, None]
    G11 *= b_c1[None, :] * b_r1[:, None]
    G21 *= b_c1[None, :] * b_r2[:, None]
    G31 *= b_c1[None, :] * b_r3[:, None]
    G22 *= b_c2[None, :] * b_r2[:, None]
    G32 *= b_c2[None, :] * b_r3[:, None]
    G33 *= b_c3[None, :] * b_r3[:, None]
    for i_g in range(GROUP):
        i_h = i_h0 + i_g
        tile = i_s.to(tl.int64) * H + i_h
        p_f = factors + tile * 256
        b_g0, b_g1, b_g2, b_g3, g_last = summed_gates(g + row * H + i_h, H, T)
        g_1 = tl.sum(tl.where(o_t == 0, b_g1, 0.0), 0)
        g_2 = tl.sum(tl.where(o_t == 0, b_g2, 0.0), 0)
        g_3 = tl.sum(tl.where(o_t == 0, b_g3, 0.0), 0)
        p_b = beta + row * H + i_h
        b_b0 = load_gate(p_b, H, o_t, T, True)
        b_b1 = load_gate(p_b, H, o_t + 16, T, True)
        b_b2 = load_gate(p_b, H, o_t + 32, T, True)
        b_b3 = load_gate(p_b, H, o_t + 48, T, True)
        store_factors(p_f + 64, b_b0, b_b1, b_b2, b_b3)
        key_factors(p_f, T, g_last, b_g0, b_g1, b_g2, b_g3, b_r0, b_r1, b_r2, b_r3)
        tl.store(decay + tile, tl.exp2(g_last))

        E00 = inv_16(diagonal_block(G00, b_g0, b_b0), DOT)
        E11 = inv_16(diagonal_block(G11, b_g1, b_b1), DOT)
        E22 = inv_16(diagonal_block(G22, b_g2, b_b2), DOT)
        E33 = inv_16(diagonal_block(G33, b_g3, b_b3), DOT)
        b_b1 = -b_b1 * tl.exp2(b_g1 - g_1)
        b_b2 = -b_b2 * tl.exp2(b_g2 - g_2)
        b_b3 = -b_b3 * tl.exp2(b_g3 - g_3)
        X10, X20, X21, X30, X31, X32 = merge_64(
            E00, E11, E22, E33, below_block(G10, b_b1, b_g0, g_1),
            below_block(G20, b_b2, b_g0, g_2), below_block(G21, b_b2, b_g1, g_2),
            below_block(G30, b_b3, b_g0, g_3), below_block(G31, b_b3, b_g1, g_3),
            below_block(G32, b_b3, b_g2, g_3), DOT,
        )  # fmt: skip
        p_A = Ai + tile * 4096
        b_0 = tl.zeros([16, 16], tl.float32)
        store_block_row(p_A, 64, o_t, 64, 4, add_identity(E00), b_0, b_0, b_0)
        store_block_row(p_A, 64, o_t + 16, 64, 4, X10, add_identity(E11), b_0, b_0)
        store_block_row(p_A, 64, o_t + 32, 64, 4, X20, X21, add_identity(E22), b_0)
        store_block_row(p_A, 64, o_t + 48, 64, 4, X30, X31, X32, add_identity(E33))


@triton.jit
def product_blocks(
    p_q, s_q, p_k, s_k, T, K: tl.constexpr, BK: tl.constexpr, IO: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """The ten lower blocks of Q K^T of one chunk, and 1 / |q| and 1 / |k| of its rows."""
    o_t = tl.arange(0, 16)
    G00 = tl.zeros([16, 16], tl.float32)
    G10, G11, G20, G21, G22 = G00, G00, G00, G00, G00
    G30, G31, G32, G33 = G00, G00, G00, G00
    b_z = tl.zeros([16], tl.float32)
    q0, q1, q2, q3, k0, k1, k2, k3 = b_z, b_z, b_z, b_z, b_z, b_z, b_z, b_z
    for i_k in tl.static_range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_q0 = load_rows(p_q, s_q, o_t, o_k, T)
        b_q1 = load_rows(p_q, s_q, o_t + 16, o_k, T)
        b_q2 = load_rows(p_q, s_q, o_t + 32, o_k, T)
        b_q3 = load_rows(p_q, s_q, o_t + 48, o_k, T)
        q0, q1 = q0 + square_sum(b_q0), q1 + square_sum(b_q1)
        q2, q3 = q2 + square_sum(b_q2), q3 + square_sum(b_q3)
        b_q0, b_q1, b_q2, b_q3 = b_q0.to(IO), b_q1.to(IO), b_q2.to(IO), b_q3.to(IO)
        b_k = load_rows(p_k, s_k, o_t, o_k, T)
        k0 += square_sum(b_k)
        b_k = tl.trans(b_k.to(IO))
        G00, G10 = tl.dot(b_q0, b_k, G00), tl.dot(b_q1, b_k, G10)
        G20, G30 = tl.dot(b_q2, b_k, G20), tl.dot(b_q3, b_k, G30)
        b_k = load_rows(p_k, s_k, o_t + 16, o_k, T)
        k1 += square_sum(b_k)
        b_k = tl.trans(b_k.to(IO))
        G11, G21, G31 = tl.dot(b_q1, b_k, G11), tl.dot(b_q2, b_k, G21), tl.dot(b_q3, b_k, G31)
        b_k = load_rows(p_k, s_k, o_t + 32, o_k, T)
        k2 += square_sum(b_k)
        b_k = tl.trans(b_k.to(IO))
        G22, G32 = tl.dot(b_q2, b_k, G22), tl.dot(b_q3, b_k, G32)
        b_k = load_rows(p_k, s_k, o_t + 48, o_k, T)
        k3 += square_sum(b_k)
        G33 = tl.dot(b_q3, tl.trans(b_k.to(IO)), G33)
    return (
        G00, G10, G11, G20, G21, G22, G30, G31, G32, G33,
        length_factor(q0, NORM), length_factor(q1, NORM), length_factor(q2, NORM),
        length_factor(q3, NORM), length_factor(k0, NORM), length_factor(k1, NORM),
        length_factor(k2, NORM), length_factor(k3, NORM),
    )  # fmt: skip


@triton.jit
def diagonal_score(b_G, b_g, b_q, b_k):
    o_i = tl.arange(0, 16)
    b_G *= tl.exp2(tl.minimum(b_g[:, None] - b_g[None, :], 0.0)) * b_q[:, None] * b_k[None, :]
    return tl.where(o_i[:, None] >= o_i[None, :], b_G, 0.0)


@triton.jit
def below_score(b_G, b_row, b_g, b_k, g_first):
    return b_G * b_row[:, None] * (tl.exp2(g_first - b_g) * b_k)[None, :]


@triton.jit
def scores_of_queries(
    p_q, s_q, p_k, s_k, g, P, factors, scale, i_s, i_h0, row, T, H: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr, BK: tl.constexpr, IO: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """P and the query's factor for GROUP value heads of one key head."""
    o_t = tl.arange(0, 16)
    (
        G00, G10, G11, G20, G21, G22, G30, G31, G32, G33, q0, q1, q2, q3, k0, k1, k2, k3,
    ) = product_blocks(p_q, s_q, p_k, s_k, T, K, BK, IO, NORM)  # fmt: skip
    q0, q1, q2, q3 = q0 * scale, q1 * scale, q2 * scale, q3 * scale
    b_0 = tl.zeros([16, 16], tl.float32)
    for i_g in range(GROUP):
        i_h = i_h0 + i_g
        tile = i_s.to(tl.int64) * H + i_h
        b_g0, b_g1, b_g2, b_g3, _ = summed_gates(g + row * H + i_h, H, T)
        g_1 = tl.sum(tl.where(o_t == 0, b_g1, 0.0), 0)
        g_2 = tl.sum(tl.where(o_t == 0, b_g2, 0.0), 0)
        g_3 = tl.sum(tl.where(o_t == 0, b_g3, 0.0), 0)
        store_factors(
            factors + tile * 256 + 192,
            q0 * tl.exp2(b_g0), q1 * tl.exp2(b_g1), q2 * tl.exp2(b_g2), q3 * tl.exp2(b_g3),
        )  # fmt: skip
        r1, r2, r3 = q1 * tl.exp2(b_g1 - g_1), q2 * tl.exp2(b_g2 - g_2), q3 * tl.exp2(b_g3 - g_3)
        p_P = P + tile * 4096
        store_block_row(p_P, 64, o_t, 64, 4, diagonal_score(G00, b_g0, q0, k0), b_0, b_0, b_0)
        store_block_row(
            p_P, 64, o_t + 16, 64, 4, below_score(G10, r1, b_g0, k0, g_1),
            diagonal_score(G11, b_g1, q1, k1), b_0, b_0,
        )  # fmt: skip
        store_block_row(
            p_P, 64, o_t + 32, 64, 4, below_score(G20, r2, b_g0, k0, g_2),
            below_score(G21, r2, b_g1, k1, g_2), diagonal_score(G22, b_g2, q2, k2), b_0,
        )  # fmt: skip
        store_block_row(
            p_P, 64, o_t + 48, 64, 4, below_score(G30, r3, b_g0, k0, g_3),
            below_score(G31, r3, b_g1, k1, g_3), below_score(G32, r3, b_g2, k2, g_3),
            diagonal_score(G33, b_g3, q3, k3),
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "N"])
def prepare_kernel(
    q, k, g, beta, Ai, P, factors, decay, cu_seqlens, scale, T, N, s_q, s_k,
    H: tl.constexpr, Hg: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr,
    BKQ: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, IO: tl.constexpr,
    VARLEN: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Ai = (I + strict_tril(beta_i exp(g_i - g_j) k_i.k_j))^-1, P = scale tril(exp(.) q_i.k_j).

    q and k are normalised here (r = 1 / |.|), g is summed here. One program, one warp: one chunk of
    64 tokens and GROUP value heads of one key head, Ai (axis 2: 0) or P (axis 2: 1). Layouts: q and
    k [T, Hg, K] with row strides s_q and s_k, g and beta [T, H], Ai and P [slots, H, 64, 64],
    factors [slots, H, 4, 64] float32 with rows exp(g_j) r_j, beta_j, exp(g_last - g_j) r_j and
    scale exp(g_i) r_i, decay float32 [slots, H]: exp(g_last). Rows past the end are zero but for
    Ai's diagonal. Nothing is written for unused slots.
    """
    i_s = tl.program_id(0)
    row, T = locate_slot(cu_seqlens, i_s, N, VARLEN, T, BN)
    if T <= 0:
        return
    i_h0 = tl.program_id(1) * GROUP
    p_k = k + row * s_k + i_h0 // (H // Hg) * K
    if tl.program_id(2) == 0:
        inverse_of_keys(
            p_k, s_k, g, beta, Ai, factors, decay, i_s, i_h0, row, T, H, K, GROUP, BK, DOT, IO,
            NORM,
        )  # fmt: skip
    else:
        p_q = q + row * s_q + i_h0 // (H // Hg) * K
        scores_of_queries(
            p_q, s_q, p_k, s_k, g, P, factors, scale, i_s, i_h0, row, T, H, K, GROUP, BKQ, IO,
            NORM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "N"])
def scores_kernel(
    q, k, g, P, factors, cu_seqlens, scale, T, N, s_q, s_k, H: tl.constexpr, Hg: tl.constexpr,
    K: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, IO: tl.constexpr, VARLEN: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """P and the query's factor as by prepare_kernel, but one dense product: four warps."""
    i_s = tl.program_id(0)
    row, T = locate_slot(cu_seqlens, i_s, N, VARLEN, T, BN)
    if T <= 0:
        return
    i_h0 = tl.program_id(1) * GROUP
    o_t, o_k = tl.arange(0, 64), tl.arange(0, K)
    b_q = load_rows(q + row * s_q + i_h0 // (H // Hg) * K, s_q, o_t, o_k, T)
    b_k = load_rows(k + row * s_k + i_h0 // (H // Hg) * K, s_k, o_t, o_k, T)
    b_rq = length_factor(square_sum(b_q), NORM) * scale
    b_rk = length_factor(square_sum(b_k), NORM)
    b_G = tl.dot(b_q.to(IO), tl.trans(b_k.to(IO))) * b_rk[None, :]
    b_G = tl.where(o_t[:, None] >= o_t[None, :], b_G, 0.0)
    for i_g in range(GROUP):
        i_h = i_h0 + i_g
        tile = i_s.to(tl.int64) * H + i_h
        b_g = tl.cumsum(load_gate(g + row * H + i_h, H, o_t, T, True) * LOG2E, 0)
        tl.store(factors + tile * 256 + 192 + o_t, b_rq * tl.exp2(b_g))
        b_P = b_G * b_rq[:, None] * tl.exp2(tl.minimum(b_g[:, None] - b_g[None, :], 0.0))
        tl.store(P + tile * 4096 + o_t[:, None] * 64 + o_t[None, :], b_P.to(P.dtype.element_ty))
