"""Gated DeltaNet intra-chunk step in one kernel: keys to inverse (kkt_solve), and on to w and u."""

import triton
import triton.language as tl

from sglang_trinv.kernels.blocks import add_identity, inv_16, inv_16_twice, merge_64, splits
from sglang_trinv.kernels.chunks import load_gate, load_rows, locate_chunk, store_block_row

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def gram_blocks(p_k, stride, o_t, T, K: tl.constexpr, BK: tl.constexpr, IO: tl.constexpr):
    """The ten blocks on and below the diagonal of K K^T of one chunk, float32."""
    G00 = tl.zeros([16, 16], tl.float32)
    G10, G11, G20, G21, G22 = G00, G00, G00, G00, G00
    G30, G31, G32, G33 = G00, G00, G00, G00
    for i_k in tl.static_range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k0 = load_rows(p_k, stride, o_t, o_k, T).to(IO)
        b_k1 = load_rows(p_k + 16 * stride, stride, o_t, o_k, T - 16).to(IO)
        b_k2 = load_rows(p_k + 32 * stride, stride, o_t, o_k, T - 32).to(IO)
        b_k3 = load_rows(p_k + 48 * stride, stride, o_t, o_k, T - 48).to(IO)
        G00 = tl.dot(b_k0, tl.trans(b_k0), G00)
        G10 = tl.dot(b_k1, tl.trans(b_k0), G10)
        G11 = tl.dot(b_k1, tl.trans(b_k1), G11)
        G20 = tl.dot(b_k2, tl.trans(b_k0), G20)
        G21 = tl.dot(b_k2, tl.trans(b_k1), G21)
        G22 = tl.dot(b_k2, tl.trans(b_k2), G22)
        G30 = tl.dot(b_k3, tl.trans(b_k0), G30)
        G31 = tl.dot(b_k3, tl.trans(b_k1), G31)
        G32 = tl.dot(b_k3, tl.trans(b_k2), G32)
        G33 = tl.dot(b_k3, tl.trans(b_k3), G33)
    return G00, G10, G11, G20, G21, G22, G30, G31, G32, G33


@triton.jit
def diagonal_block(b_G, b_g, b_b):
    """N = -strict_tril(beta_i exp(g_i - g_j) G_ij) of a diagonal block."""
    o_i = tl.arange(0, 16)
    b_N = b_G * tl.exp2(b_g[:, None] - b_g[None, :]) * -b_b[:, None]
    return tl.where(o_i[:, None] > o_i[None, :], b_N, 0.0)


@triton.jit
def invert_diagonal(
    G00, G11, G22, G33, b_g0, b_g1, b_g2, b_g3, b_b0, b_b1, b_b2, b_b3, DOT: tl.constexpr
):
    """E of the four diagonal blocks, two at a time where products split their operands."""
    if splits(DOT):
        N00, N11 = diagonal_block(G00, b_g0, b_b0), diagonal_block(G11, b_g1, b_b1)
        N22, N33 = diagonal_block(G22, b_g2, b_b2), diagonal_block(G33, b_g3, b_b3)
        E00, E22 = inv_16_twice(N00, N22, DOT)
        E11, E33 = inv_16_twice(N11, N33, DOT)
    else:
        E00 = inv_16(diagonal_block(G00, b_g0, b_b0), DOT)
        E11 = inv_16(diagonal_block(G11, b_g1, b_b1), DOT)
        E22 = inv_16(diagonal_block(G22, b_g2, b_b2), DOT)
        E33 = inv_16(diagonal_block(G33, b_g3, b_b3), DOT)
    return E00, E11, E22, E33


@triton.jit
def below_block(b_G, b_row, b_gj, g_first):
    """N of a block below the diagonal, from b_row = -beta_i exp(g_i - g_first).

    ``g_first`` is the gate at the block's first row: both factors are <= 1 where g does not grow.
    """
    return b_G * b_row[:, None] * tl.exp2(g_first - b_gj)[None, :]


@triton.jit
def scale_rows(b_x, b_s, IO: tl.constexpr):
    """diag(s) x, rounded to x's dtype as SGLang does: s in the inverse errs more on constant s."""
    return (b_x.to(tl.float32) * b_s[:, None]).to(b_x.dtype).to(IO)


@triton.jit
def load_decay(p_b, p_g, stride, o_t, T, HAS_G: tl.constexpr):
    """beta exp(g), or beta, read again; by load_gate the compiler would make one of equal loads.

    Kept through the inverse it would not fit the registers.
    """
    b_s = tl.load(p_b + o_t * stride, mask=o_t < T, other=0.0).to(tl.float32)
    if HAS_G:
        b_g = tl.load(p_g + o_t * stride, mask=o_t < T, other=0.0).to(tl.float32)
        b_s *= tl.exp2(b_g * LOG2E)
    return b_s


@triton.jit
def apply_inverse(
    p_x, s_x, p_y, s_y, o_t, T, b_s0, b_s1, b_s2, b_s3,
    X00, X10, X11, X20, X21, X22, X30, X31, X32, X33,
    D: tl.constexpr, BD: tl.constexpr, IO: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = X diag(s) x for [64, D] tiles, X lower triangular by blocks."""
    e = p_y.dtype.element_ty
    o_d = tl.arange(0, BD)
    for i_d in tl.range(0, D, BD, num_stages=STAGES):
        p = p_y + i_d + o_t[:, None] * s_y + o_d[None, :]
        b_x0 = load_rows(p_x + i_d, s_x, o_t, o_d, T)
        b_x0 = scale_rows(b_x0, b_s0, IO)
        b_y = tl.dot(X00, b_x0)
        tl.store(p, b_y.to(e), mask=(o_t < T)[:, None])
        b_x1 = load_rows(p_x + 16 * s_x + i_d, s_x, o_t, o_d, T - 16)
        b_x1 = scale_rows(b_x1, b_s1, IO)
        b_y = tl.dot(X11, b_x1, tl.dot(X10, b_x0))
        tl.store(p + 16 * s_y, b_y.to(e), mask=(o_t + 16 < T)[:, None])
        b_x2 = load_rows(p_x + 32 * s_x + i_d, s_x, o_t, o_d, T - 32)
        b_x2 = scale_rows(b_x2, b_s2, IO)
        b_y = tl.dot(X22, b_x2, tl.dot(X21, b_x1, tl.dot(X20, b_x0)))
        tl.store(p + 32 * s_y, b_y.to(e), mask=(o_t + 32 < T)[:, None])
        b_x3 = load_rows(p_x + 48 * s_x + i_d, s_x, o_t, o_d, T - 48)
        b_x3 = scale_rows(b_x3, b_s3, IO)
        b_y = tl.dot(X33, b_x3, tl.dot(X32, b_x2, tl.dot(X31, b_x1, tl.dot(X30, b_x0))))
        tl.store(p + 48 * s_y, b_y.to(e), mask=(o_t + 48 < T)[:, None])


@triton.jit(do_not_specialize=["T"])
def fwd_intra_kernel(
    k, v, g, beta, w, u, Ai, cu_seqlens, chunk_indices, T,
    H: tl.constexpr, Hg: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr, BDK: tl.constexpr, BDV: tl.constexpr, DOT: tl.constexpr, IO: tl.constexpr,
    STAGES: tl.constexpr, HAS_G: tl.constexpr, VARLEN: tl.constexpr, STORE_A: tl.constexpr,
    STORE_WU: tl.constexpr,
):  # fmt: skip
    """Ai = (I + strict_tril(beta_i exp(g_i - g_j) k_i.k_j))^-1, w = Ai beta e^g k, u = Ai beta v.

    One program, one warp: a chunk of 64 tokens and GROUP value heads of one key head. Layouts:
    k [B, T, Hg, K], v and u [B, T, H, V], w [B, T, H, K], g and beta [B, T, H], Ai [B, T, H, 64].
    IO is the dtype in which k, v and Ai are multiplied (float32 under the interpreter only).
    """
    row, T = locate_chunk(cu_seqlens, chunk_indices, T, 64, VARLEN)
    if T <= 0:
        return
    i_h0 = tl.program_id(1) * GROUP
    p_k = k + (row * Hg + i_h0 // (H // Hg)) * K
    o_t = tl.arange(0, 16)
    G00, G10, G11, G20, G21, G22, G30, G31, G32, G33 = gram_blocks(p_k, Hg * K, o_t, T, K, BK, IO)
    for i_g in range(GROUP):
        i_h = i_h0 + i_g
        p_b, p_g = beta + row * H + i_h, None
        b_b0 = load_gate(p_b, H, o_t, T, True)
        b_b1 = load_gate(p_b, H, o_t + 16, T, True)
        b_b2 = load_gate(p_b, H, o_t + 32, T, True)
        b_b3 = load_gate(p_b, H, o_t + 48, T, True)
        b_g0 = tl.zeros([16], tl.float32)
        b_g1, b_g2, b_g3 = b_g0, b_g0, b_g0
        g_1, g_2, g_3 = 0.0, 0.0, 0.0
        if HAS_G:
            p_g = g + row * H + i_h
            b_g0 = load_gate(p_g, H, o_t, T, False) * LOG2E
            b_g1 = load_gate(p_g, H, o_t + 16, T, False) * LOG2E
            b_g2 = load_gate(p_g, H, o_t + 32, T, False) * LOG2E
            b_g3 = load_gate(p_g, H, o_t + 48, T, False) * LOG2E
            g_1 = tl.load(p_g + tl.minimum(16, T - 1) * H).to(tl.float32) * LOG2E
            g_2 = tl.load(p_g + tl.minimum(32, T - 1) * H).to(tl.float32) * LOG2E
            g_3 = tl.load(p_g + tl.minimum(48, T - 1) * H).to(tl.float32) * LOG2E

        E00, E11, E22, E33 = invert_diagonal(
            G00, G11, G22, G33, b_g0, b_g1, b_g2, b_g3, b_b0, b_b1, b_b2, b_b3, DOT
        )
        b_r1 = -b_b1 * tl.exp2(b_g1 - g_1)
        b_r2 = -b_b2 * tl.exp2(b_g2 - g_2)
        b_r3 = -b_b3 * tl.exp2(b_g3 - g_3)
        X10, X20, X21, X30, X31, X32 = merge_64(
            E00, E11, E22, E33, below_block(G10, b_r1, b_g0, g_1),
            below_block(G20, b_r2, b_g0, g_2), below_block(G21, b_r2, b_g1, g_2),
            below_block(G30, b_r3, b_g0, g_3), below_block(G31, b_r3, b_g1, g_3),
            below_block(G32, b_r3, b_g2, g_3), DOT,
        )  # fmt: skip
        X00, X11, X22, X33 = (
            add_identity(E00),
            add_identity(E11),
            add_identity(E22),
            add_identity(E33),
        )

        if STORE_A:
            p_A = Ai + (row * H + i_h) * 64
            b_0 = tl.zeros([16, 16], tl.float32)
            store_block_row(p_A, H * 64, o_t, T, 4, X00, b_0, b_0, b_0)
            store_block_row(p_A, H * 64, o_t + 16, T, 4, X10, X11, b_0, b_0)
            store_block_row(p_A, H * 64, o_t + 32, T, 4, X20, X21, X22, b_0)
            store_block_row(p_A, H * 64, o_t + 48, T, 4, X30, X31, X32, X33)
        if STORE_WU:
            e = v.dtype.element_ty
            X00, X10, X11 = X00.to(e).to(IO), X10.to(e).to(IO), X11.to(e).to(IO)
            X20, X21, X22 = X20.to(e).to(IO), X21.to(e).to(IO), X22.to(e).to(IO)
            X30, X31 = X30.to(e).to(IO), X31.to(e).to(IO)
            X32, X33 = X32.to(e).to(IO), X33.to(e).to(IO)
            if splits(DOT):
                b_b0 = load_decay(p_b, None, H, o_t, T, False)
                b_b1 = load_decay(p_b, None, H, o_t + 16, T, False)
                b_b2 = load_decay(p_b, None, H, o_t + 32, T, False)
                b_b3 = load_decay(p_b, None, H, o_t + 48, T, False)
            apply_inverse(
                v + (row * H + i_h) * V, H * V, u + (row * H + i_h) * V, H * V, o_t, T,
                b_b0, b_b1, b_b2, b_b3,
                X00, X10, X11, X20, X21, X22, X30, X31, X32, X33, V, BDV, IO, STAGES,
            )  # fmt: skip
            apply_inverse(
                p_k, Hg * K, w + (row * H + i_h) * K, H * K, o_t, T,
                load_decay(p_b, p_g, H, o_t, T, HAS_G), load_decay(p_b, p_g, H, o_t + 16, T, HAS_G),
                load_decay(p_b, p_g, H, o_t + 32, T, HAS_G),
                load_decay(p_b, p_g, H, o_t + 48, T, HAS_G),
                X00, X10, X11, X20, X21, X22, X30, X31, X32, X33, K, BDK, IO, STAGES,
            )  # fmt: skip
