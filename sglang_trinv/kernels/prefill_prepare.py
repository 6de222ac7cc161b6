"""Everything of the Gated DeltaNet prefill that needs no state: scores, factors and inverses."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from sglang_trinv.kernels.blocks import add_identity, merge_64_or_halves
from sglang_trinv.kernels.chunks import load_gate, load_rows, store_block_row
from sglang_trinv.kernels.fwd_intra import below_block, gram_blocks, invert_diagonal

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
def length_factor(b_d, NORM: tl.constexpr):
    """What normalises a row whose squares sum to ``b_d``."""
    return tl.rsqrt(b_d + L2NORM_EPS) if NORM else tl.full(b_d.shape, 1.0, tl.float32)


@triton.jit
def square_sum(b_x):
    b_x = b_x.to(tl.float32)
    return tl.sum(b_x * b_x, 1)


@triton.jit
def store_lengths(p_r, b_G, o_t, T, NORM: tl.constexpr):
    """Store 1 / |k| of 16 rows, from the diagonal of their products; 0 past the end."""
    o_i = tl.arange(0, 16)
    b_d = tl.sum(tl.where(o_i[:, None] == o_i[None, :], b_G, 0.0), 1)
    tl.store(p_r + o_t, tl.where(o_t < T, length_factor(b_d, NORM), 0.0))


@triton.jit
def unit_gram_blocks(
    p_k, s_k, p_r, o_t, T, K: tl.constexpr, BK: tl.constexpr, IO: tl.constexpr, NORM: tl.constexpr
):
    """The ten lower blocks of the normalised K K^T of one chunk; 1 / |k| is stored at ``p_r``."""
    G00, G10, G11, G20, G21, G22, G30, G31, G32, G33 = gram_blocks(p_k, s_k, o_t, T, K, BK, IO)
    store_lengths(p_r, G00, o_t, T, NORM)
    store_lengths(p_r, G11, o_t + 16, T, NORM)
    store_lengths(p_r, G22, o_t + 32, T, NORM)
    store_lengths(p_r, G33, o_t + 48, T, NORM)
    tl.debug_barrier()
    b_r0, b_r1 = tl.load(p_r + o_t), tl.load(p_r + 16 + o_t)
    b_r2, b_r3 = tl.load(p_r + 32 + o_t), tl.load(p_r + 48 + o_t)
    G00 *= b_r0[None, :] * b_r0[:, None]
    G10 *= b_r0[None, :] * b_r1[:, None]
    G20 *= b_r0[None, :] * b_r2[:, None]
    G30 *= b_r0[None, :] * b_r3[:, None]
    G11 *= b_r1[None, :] * b_r1[:, None]
    G21 *= b_r1[None, :] * b_r2[:, None]
    G31 *= b_r1[None, :] * b_r3[:, None]
    G22 *= b_r2[None, :] * b_r2[:, None]
    G32 *= b_r2[None, :] * b_r3[:, None]
    G33 *= b_r3[None, :] * b_r3[:, None]
    return G00, G10, G11, G20, G21, G22, G30, G31, G32, G33


@triton.jit
def carry_rounding(b_E, dtype: tl.constexpr, IO: tl.constexpr):
    """E of a diagonal block, plus what rounding each row to ``dtype`` will lose, one row below.

    Near-equal keys add up the rows of Ai: the state is their sum. Rounded one by one, the large
    entries next to the diagonal leave 64 errors in it; the row below has smaller entries and so
    the bits to take them back (docs/numerics.md#carried-rounding).
    """
    o_i = tl.arange(0, 16)
    b_lost = b_E - b_E.to(dtype).to(tl.float32)
    b_down = tl.where(o_i[:, None] == o_i[None, :] + 1, 1.0, 0.0)
    return tl.dot(b_down.to(IO), b_lost.to(IO), b_E)


@triton.jit(do_not_specialize=["T", "N"], do_not_specialize_on_alignment=["cu_seqlens"])
def inverse_kernel(
    k, g, beta, inverses, factors, cu_seqlens, T, N, s_k,
    H: tl.constexpr, Hg: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, DOT: tl.constexpr, IO: tl.constexpr, VARLEN: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Ai = (I + strict_tril(beta_i exp(g_i - g_j) r_i k_i.k_j r_j))^-1, and the keys' factors.

    k is normalised here (r = 1 / |k|), g is summed here. One program, one warp: one chunk of 64
    tokens and GROUP value heads of one key head. Layouts: k [T, Hg, K] with row stride s_k, g and
    beta [T, H], inverses [slots, H, 64, 64]: Ai, factors float32 [slots, H, 6, 64]: beta_j exp(g_j)
    r_j, beta_j, exp(g_last - g_j) r_j, one left free, log2(e) times the summed g, r_j. Past the end
    Ai is the identity, factors are zero and g repeats its last value. Nothing is written for unused
    slots.
    """
    i_s = tl.program_id(0)
    row, T = locate_slot(cu_seqlens, i_s, N, VARLEN, T, BN)
    if T <= 0:
        return
    i_h0 = tl.program_id(1) * GROUP
    o_t, o_c = tl.arange(0, 16), tl.arange(0, 64)
    p_k = k + row * s_k + i_h0 // (H // Hg) * K
    p_r = factors + (i_s.to(tl.int64) * H + i_h0) * 384 + 320
    G00, G10, G11, G20, G21, G22, G30, G31, G32, G33 = unit_gram_blocks(
        p_k, s_k, p_r, o_t, T, K, BK, IO, NORM
    )
    for i_g in range(GROUP):
        i_h = i_h0 + i_g
        tile = i_s.to(tl.int64) * H + i_h
        b_g = tl.cumsum(load_gate(g + row * H + i_h, H, o_c, T, True) * LOG2E, 0)
        b_b = load_gate(beta + row * H + i_h, H, o_c, T, True)
        b_r = tl.load(p_r + o_c)
        g_last = tl.sum(tl.where(o_c == 63, b_g, 0.0), 0)
        p_f = factors + tile * 384 + o_c
        tl.store(p_f, b_b * b_r * tl.exp2(b_g))
        tl.store(p_f + 64, b_b)
        tl.store(p_f + 128, b_r * tl.exp2(g_last - b_g))
        tl.store(p_f + 256, b_g)
        tl.store(p_f + 320, b_r)
        tl.debug_barrier()
        p_b, p_g = factors + tile * 384 + 64, factors + tile * 384 + 256
        b_b0, b_b1 = tl.load(p_b + o_t), tl.load(p_b + 16 + o_t)
        b_b2, b_b3 = tl.load(p_b + 32 + o_t), tl.load(p_b + 48 + o_t)
        b_g0, b_g1 = tl.load(p_g + o_t), tl.load(p_g + 16 + o_t)
        b_g2, b_g3 = tl.load(p_g + 32 + o_t), tl.load(p_g + 48 + o_t)
        g_1, g_2, g_3 = tl.load(p_g + 16), tl.load(p_g + 32), tl.load(p_g + 48)
        E00, E11, E22, E33 = invert_diagonal(
            G00, G11, G22, G33, b_g0, b_g1, b_g2, b_g3, b_b0, b_b1, b_b2, b_b3, DOT
        )
        b_b1 = -b_b1 * tl.exp2(b_g1 - g_1)
        b_b2 = -b_b2 * tl.exp2(b_g2 - g_2)
        b_b3 = -b_b3 * tl.exp2(b_g3 - g_3)
        X10, X20, X21, X30, X31, X32 = merge_64_or_halves(
            E00, E11, E22, E33, below_block(G10, b_b1, b_g0, g_1),
            below_block(G20, b_b2, b_g0, g_2), below_block(G21, b_b2, b_g1, g_2),
            below_block(G30, b_b3, b_g0, g_3), below_block(G31, b_b3, b_g1, g_3),
            below_block(G32, b_b3, b_g2, g_3), DOT,
        )  # fmt: skip
        e = inverses.dtype.element_ty
        E00, E11 = carry_rounding(E00, e, IO), carry_rounding(E11, e, IO)
        E22, E33 = carry_rounding(E22, e, IO), carry_rounding(E33, e, IO)
        E00, E11, E22, E33 = (
            add_identity(E00), add_identity(E11), add_identity(E22), add_identity(E33)
        )  # fmt: skip
        p_A = inverses + tile * 4096
        b_0 = tl.zeros([16, 16], tl.float32)
        store_block_row(p_A, 64, o_t, 64, 4, E00, b_0, b_0, b_0)
        store_block_row(p_A, 64, o_t + 16, 64, 4, X10, E11, b_0, b_0)
        store_block_row(p_A, 64, o_t + 32, 64, 4, X20, X21, E22, b_0)
        store_block_row(p_A, 64, o_t + 48, 64, 4, X30, X31, X32, E33)


@triton.jit
def score_tile(
    q, k, scores, factors, cu_seqlens, scale, T, N, s_q, s_k, i_s, i_hg,
    H: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, IO: tl.constexpr,
    VARLEN: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Slot i_s of the GROUP value heads of key head i_hg: see scores_kernel."""
    row, T = locate_slot(cu_seqlens, i_s, N, VARLEN, T, BN)
    if T > 0:
        o_t, o_k = tl.arange(0, 64), tl.arange(0, K)
        b_q = load_rows(q + row * s_q + i_hg * K, s_q, o_t, o_k, T)
        b_k = load_rows(k + row * s_k + i_hg * K, s_k, o_t, o_k, T)
        b_rq = length_factor(square_sum(b_q), NORM) * scale
        p_f = factors + (i_s.to(tl.int64) * H + i_hg * GROUP) * 384 + o_t
        b_G = tl.dot(b_q.to(IO), tl.trans(b_k.to(IO))) * tl.load(p_f + 320)[None, :]
        b_G = tl.where(o_t[:, None] >= o_t[None, :], b_G, 0.0) * b_rq[:, None]
        p_P = scores + (i_s.to(tl.int64) * H + i_hg * GROUP) * 4096
        p_P += o_t[:, None] * 64 + o_t[None, :]
        for _ in range(GROUP):
            b_g = tl.load(p_f + 256)
            tl.store(p_f + 192, b_rq * tl.exp2(b_g))
            b_P = b_G * tl.exp2(tl.minimum(b_g[:, None] - b_g[None, :], 0.0))
            tl.store(p_P, b_P.to(scores.dtype.element_ty))
            p_f += 384
            p_P += 4096


@triton.jit(do_not_specialize=["T", "N", "tiles"], do_not_specialize_on_alignment=["cu_seqlens"])
def scores_kernel(
    q, k, scores, factors, marks, cu_seqlens, scale, T, N, tiles, s_q, s_k,
    H: tl.constexpr, Hg: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
    IO: tl.constexpr, VARLEN: tl.constexpr, NORM: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """P_ij = scale exp(g_i - g_j) r_i q_i.k_j r_j for i >= j, else 0, and the queries' factors.

    q is normalised here. One program: one chunk and the GROUP value heads of one key head. Layouts
    as in inverse_kernel, which wrote the keys' factors before, and scores [slots, H, 64, 64]: P;
    scale exp(g_i) r_i of the queries is the factor that was left free. With BESIDE programs take
    chunk after chunk of a key head, heads first, while the state pass runs: marks[1 + chunk Hg +
    head] becomes 1 when all is stored.
    """
    if BESIDE:
        gdc_launch_dependents()
        for p in range(tl.program_id(0), tiles, tl.num_programs(0)):
            score_tile(
                q, k, scores, factors, cu_seqlens, scale, T, N, s_q, s_k, p // Hg, p % Hg,
                H, K, GROUP, BN, IO, VARLEN, NORM,
            )  # fmt: skip
            tl.debug_barrier()
            tl.atomic_xchg(marks + 1 + p, 1, sem="release")
    else:
        score_tile(
            q, k, scores, factors, cu_seqlens, scale, T, N, s_q, s_k, tl.program_id(0),
            tl.program_id(1), H, K, GROUP, BN, IO, VARLEN, NORM,
        )  # fmt: skip
