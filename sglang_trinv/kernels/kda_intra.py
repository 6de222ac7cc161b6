"""Kimi Delta Attention intra-chunk step in one kernel: queries, keys and gates to Aqk, w, u, kg."""

import triton
import triton.language as tl

from sglang_trinv.kernels.blocks import add_identity, inv_16, inv_16_twice, merge_64, splits
from sglang_trinv.kernels.chunks import load_gate, load_rows, locate_chunk, store_block_row
from sglang_trinv.kernels.kda_products import (
    KB_SCALE,
    below_diagonal,
    cut,
    first_gate,
    left_block,
    load_gate_row,
    load_gates,
    on_and_below_diagonal,
    operand,
    row_block,
)


@triton.jit
def apply_inverse(
    p_x, p_y, p_g, s, o_t, T, unit, b_s0, b_s1, b_s2, b_s3,
    X00, X10, X11, X20, X21, X22, X30, X31, X32, X33,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, IO: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = X diag(s) x (ROWS), or X x diag(exp2(g_0)) / KB_SCALE, for [64, D] tiles; y may be x.

    X is lower triangular by blocks. It is rounded to x's dtype, as x is once its rows are scaled.
    """
    e = p_y.dtype.element_ty
    f = p_x.dtype.element_ty
    X00, X10, X11 = X00.to(f).to(IO), X10.to(f).to(IO), X11.to(f).to(IO)
    X20, X21, X22 = X20.to(f).to(IO), X21.to(f).to(IO), X22.to(f).to(IO)
    X30, X31, X32, X33 = X30.to(f).to(IO), X31.to(f).to(IO), X32.to(f).to(IO), X33.to(f).to(IO)
    o_d = tl.arange(0, BD)
    for i_d in tl.range(0, D, BD, num_stages=STAGES):
        p = p_y + i_d + o_t[:, None] * s + o_d[None, :]
        b_x0 = load_rows(p_x + i_d, s, o_t, o_d, T)
        b_x1 = load_rows(p_x + 16 * s + i_d, s, o_t, o_d, T - 16)
        b_x2 = load_rows(p_x + 32 * s + i_d, s, o_t, o_d, T - 32)
        b_x3 = load_rows(p_x + 48 * s + i_d, s, o_t, o_d, T - 48)
        b_c = 1.0
        if ROWS:
            b_x0 = (b_x0.to(tl.float32) * b_s0[:, None]).to(f)
            b_x1 = (b_x1.to(tl.float32) * b_s1[:, None]).to(f)
            b_x2 = (b_x2.to(tl.float32) * b_s2[:, None]).to(f)
            b_x3 = (b_x3.to(tl.float32) * b_s3[:, None]).to(f)
        else:
            b_c = tl.exp2(tl.abs(first_gate(p_g + i_d, s, o_d, T)) * unit) / KB_SCALE
        b_x0, b_x1, b_x2, b_x3 = b_x0.to(IO), b_x1.to(IO), b_x2.to(IO), b_x3.to(IO)
        b_y = tl.dot(X00, b_x0) * b_c
        tl.store(p, b_y.to(e), mask=(o_t < T)[:, None])
        b_y = tl.dot(X11, b_x1, tl.dot(X10, b_x0)) * b_c
        tl.store(p + 16 * s, b_y.to(e), mask=(o_t + 16 < T)[:, None])
        b_y = tl.dot(X22, b_x2, tl.dot(X21, b_x1, tl.dot(X20, b_x0))) * b_c
        tl.store(p + 32 * s, b_y.to(e), mask=(o_t + 32 < T)[:, None])
        b_y = tl.dot(X33, b_x3, tl.dot(X32, b_x2, tl.dot(X31, b_x1, tl.dot(X30, b_x0)))) * b_c
        tl.store(p + 48 * s, b_y.to(e), mask=(o_t + 48 < T)[:, None])


@triton.jit(do_not_specialize=["T"])
def kda_intra_kernel(
    q, k, v, gk, beta, w, u, kg, Aqk, Akk, cu_seqlens, chunk_indices, scale, unit, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BDK: tl.constexpr,
    BDV: tl.constexpr, DOT: tl.constexpr, IO: tl.constexpr, STAGES: tl.constexpr,
    VARLEN: tl.constexpr, STORE_A: tl.constexpr, ZERO_UPPER: tl.constexpr,
):  # fmt: skip
    """Aqk = scale tril(q k^T o D), w = Ai (beta exp2(g) k), u = Ai (beta v), kg = exp2(g_l - g) k.

    g_l is the gate of the chunk's last token, Ai = Akk = (I + strict_tril(beta k k^T o D))^-1, D
    the decay of each channel within the sums. One program, one warp: 64 tokens of one head.
    Layouts: q, k, w, kg, gk [B, T, H, K], v and u [B, T, H, V], beta [B, T, H], Aqk and Akk
    [B, T, H, 64]. gk is float32, summed within the chunk; unit is -1, see decay.
    w holds kb ~ beta exp2(g - g_0) k until the inverse is ready: in float16 where the method
    multiplies in it, for w is a difference of rows that are almost the same when keys are. g_0 is
    first_gate, with which kb stays within float16's range for longer.
    IO is the dtype in which loaded tiles are multiplied (float32 under the interpreter only).
    """
    row, T = locate_chunk(cu_seqlens, chunk_indices, T, 64, VARLEN)
    if T <= 0:
        return
    i_h = tl.program_id(1)
    head = row * H + i_h
    s = H * K
    q, k, gk, w, kg = q + head * K, k + head * K, gk + head * K, w + head * K, kg + head * K
    p_Q, p_b = Aqk + head * 64, beta + head
    HALF: tl.constexpr = DOT == "fp16" or DOT == "fp16x2"
    kb = w.to(tl.pointer_type(tl.float16 if HALF else w.dtype.element_ty), bitcast=True)
    KB: tl.constexpr = tl.float16 if HALF and IO != tl.float32 else IO
    o_t = tl.arange(0, 16)
    b_0 = tl.zeros([16, 16], tl.float32)
    N1: tl.constexpr = 4 if ZERO_UPPER else 1
    N2: tl.constexpr = 4 if ZERO_UPPER else 2
    o_1, o_2, o_3 = o_t + 16, o_t + 32, o_t + 48

    # A row of blocks after the other, the last one in two parts: with more alive at once, registers
    # spill. What is read again comes from L1.
    Q0, G00 = b_0, b_0
    for i_k in tl.range(0, K, BK, num_stages=1):
        o_k = i_k + tl.arange(0, BK)
        Q0, G00, _, _, _ = row_block(
            q, k, gk, p_b, kb, kg, s, H, o_t, o_k, T, unit, Q0, G00, DOT, IO
        )  # fmt: skip
    Q0 = on_and_below_diagonal(Q0, scale)
    store_block_row(p_Q, H * 64, o_t, T, N1, Q0, b_0, b_0, b_0)

    Q0, Q1, G10, G11 = b_0, b_0, b_0, b_0
    for i_k in tl.range(0, K, BK, num_stages=1):
        o_k = i_k + tl.arange(0, BK)
        Q1, G11, b_q, b_k, b_g = row_block(
            q, k, gk, p_b, kb, kg, s, H, o_1, o_k, T, unit, Q1, G11, DOT, IO
        )
        b_r = load_gate_row(gk, s, 16, o_k, T)
        b_q, b_k = cut(b_q, b_k, b_g, b_r, unit, DOT)
        Q0, G10 = left_block(k, gk, b_r, b_q, b_k, s, o_t, o_k, T, unit, Q0, G10, DOT, IO)
    Q1 = on_and_below_diagonal(Q1, scale)
    store_block_row(p_Q, H * 64, o_1, T, N2, Q0 * scale, Q1, b_0, b_0)

    Q0, Q1, Q2, G20, G21, G22 = b_0, b_0, b_0, b_0, b_0, b_0
    for i_k in tl.range(0, K, BK, num_stages=1):
        o_k = i_k + tl.arange(0, BK)
        Q2, G22, b_q, b_k, b_g = row_block(
            q, k, gk, p_b, kb, kg, s, H, o_2, o_k, T, unit, Q2, G22, DOT, IO
        )
        b_r = load_gate_row(gk, s, 32, o_k, T)
        b_q, b_k = cut(b_q, b_k, b_g, b_r, unit, DOT)
        Q0, G20 = left_block(k, gk, b_r, b_q, b_k, s, o_t, o_k, T, unit, Q0, G20, DOT, IO)
        Q1, G21 = left_block(k, gk, b_r, b_q, b_k, s, o_1, o_k, T, unit, Q1, G21, DOT, IO)
    Q2 = on_and_below_diagonal(Q2, scale)
    store_block_row(p_Q, H * 64, o_2, T, 4, Q0 * scale, Q1 * scale, Q2, b_0)

    Q2, Q3, G32, G33 = b_0, b_0, b_0, b_0
    for i_k in tl.range(0, K, BK, num_stages=1):
        o_k = i_k + tl.arange(0, BK)
        Q3, G33, b_q, b_k, b_g = row_block(
            q, k, gk, p_b, kb, kg, s, H, o_3, o_k, T, unit, Q3, G33, DOT, IO
        )
        b_r = load_gate_row(gk, s, 48, o_k, T)
        b_q, b_k = cut(b_q, b_k, b_g, b_r, unit, DOT)
        Q2, G32 = left_block(k, gk, b_r, b_q, b_k, s, o_2, o_k, T, unit, Q2, G32, DOT, IO)
    Q0, Q1, G30, G31 = b_0, b_0, b_0, b_0
    for i_k in tl.range(0, K, BK, num_stages=1):
        o_k = i_k + tl.arange(0, BK)
        b_q = operand(load_rows(q, s, o_3, o_k, T).to(IO), DOT)
        b_k = operand(load_rows(k, s, o_3, o_k, T).to(IO), DOT)
        b_r = load_gate_row(gk, s, 32, o_k, T)
        b_q, b_k = cut(b_q, b_k, load_gates(gk, s, o_3, o_k, T), b_r, unit, DOT)
        Q0, G30 = left_block(k, gk, b_r, b_q, b_k, s, o_t, o_k, T, unit, Q0, G30, DOT, IO)
        Q1, G31 = left_block(k, gk, b_r, b_q, b_k, s, o_1, o_k, T, unit, Q1, G31, DOT, IO)
    Q3 = on_and_below_diagonal(Q3, scale)
    store_block_row(p_Q, H * 64, o_3, T, 4, Q0 * scale, Q1 * scale, Q2 * scale, Q3)

    b_b0, b_b1 = load_gate(p_b, H, o_t, T, True), load_gate(p_b, H, o_1, T, True)
    b_b2, b_b3 = load_gate(p_b, H, o_2, T, True), load_gate(p_b, H, o_3, T, True)
    if splits(DOT):
        E00, E22 = inv_16_twice(below_diagonal(G00, b_b0), below_diagonal(G22, b_b2), DOT)
        E11, E33 = inv_16_twice(below_diagonal(G11, b_b1), below_diagonal(G33, b_b3), DOT)
    else:
        E00, E11 = inv_16(below_diagonal(G00, b_b0), DOT), inv_16(below_diagonal(G11, b_b1), DOT)
        E22, E33 = inv_16(below_diagonal(G22, b_b2), DOT), inv_16(below_diagonal(G33, b_b3), DOT)
    b_n1, b_n2, b_n3 = -b_b1[:, None], -b_b2[:, None], -b_b3[:, None]
    X10, X20, X21, X30, X31, X32 = merge_64(
        E00, E11, E22, E33,
        G10 * b_n1, G20 * b_n2, G21 * b_n2, G30 * b_n3, G31 * b_n3, G32 * b_n3, DOT,
    )  # fmt: skip
    X00, X11, X22, X33 = add_identity(E00), add_identity(E11), add_identity(E22), add_identity(E33)
    if STORE_A:
        p_A = Akk + head * 64
        store_block_row(p_A, H * 64, o_t, T, 4, X00, b_0, b_0, b_0)
        store_block_row(p_A + 16 * H * 64, H * 64, o_t, T - 16, 4, X10, X11, b_0, b_0)
        store_block_row(p_A + 32 * H * 64, H * 64, o_t, T - 32, 4, X20, X21, X22, b_0)
        store_block_row(p_A + 48 * H * 64, H * 64, o_t, T - 48, 4, X30, X31, X32, X33)
    apply_inverse(
        v + head * V, u + head * V, gk, H * V, o_t, T, unit, b_b0, b_b1, b_b2, b_b3,
        X00, X10, X11, X20, X21, X22, X30, X31, X32, X33, V, BDV, True, IO, STAGES,
    )  # fmt: skip
    tl.debug_barrier()  # other lanes than those that stored kb in w read it
    apply_inverse(
        kb, w, gk, s, o_t, T, unit, b_b0, b_b1, b_b2, b_b3,
        X00, X10, X11, X20, X21, X22, X30, X31, X32, X33, K, BDK, False, KB, STAGES,
    )  # fmt: skip
