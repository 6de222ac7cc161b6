"""Products of rows with a gate in each channel, for Kimi Delta Attention: device functions.

Each key channel has its own gate, so ``sum_c x_ic k_jc exp2(g_ic - g_jc)`` is a matrix product only
after the gate is cut at a row r between j and i: exp2(g_i - g_r) goes to the row, exp2(g_r - g_j)
to the column, and both are at most 1 as gates fall. Here r halves the rows again and again: 32,
then 16 and 48, then 8, 24, ... down to single rows, so every pair i > j is cut exactly once, at the
first row of the upper half of the smallest aligned block that holds both. At each level a row of
the tile is either above or below its r; one factor ``exp2(-|g - g_r|)`` serves both, and one scaled
tile is both operands. Products of rows that another level cuts are finite and dropped. Nothing is
clamped and no exponent is positive, however steep the gates (docs/numerics.md#kda).
"""

import triton
import triton.language as tl

from sglang_trinv.kernels.chunks import load_gate, load_rows

KB_SCALE = tl.constexpr(16384.0)  # <= float16's largest / 2: what decays stays normal for longer


@triton.jit
def operand(b_x, DOT: tl.constexpr):
    """x as the products take it: fp16 has 3 bits more than bfloat16; |k| <= 1 needs no range."""
    if DOT == "fp16" or DOT == "fp16x2":
        return b_x.to(tl.float16)
    else:
        return b_x.to(tl.float32)


@triton.jit
def row_products(b_x, b_y, b_acc, DOT: tl.constexpr):
    """``acc + x y^T`` in float32."""
    if DOT == "fp16" or DOT == "fp16x2":
        return tl.dot(b_x, tl.trans(b_y), b_acc)
    else:
        return tl.dot(b_x, tl.trans(b_y), b_acc, input_precision=DOT)


@triton.jit
def decay(b_g, b_r, unit):
    """Factor between rows with gates g and r, whichever is later: exp2(-|g - r|) for unit -1.

    ``unit`` is no constant for a reason beside the log's base: it keeps Triton from computing the
    factor twice, in the layouts of the left and of the right operand.
    """
    return tl.exp2(tl.abs(b_g - b_r) * unit)


@triton.jit
def cut(b_q, b_k, b_g, b_r, unit, DOT: tl.constexpr):
    """Operands q and k decayed between their gates and r."""
    b_E = operand(decay(b_g, b_r, unit), DOT)
    return b_q * b_E, b_k * b_E


@triton.jit
def load_gates(p_g, s, o_t, o_k, T):
    """Gates of rows o_t; rows past the end repeat the last row, so no exponent rises."""
    return tl.load(p_g + tl.minimum(o_t, T - 1)[:, None] * s + o_k[None, :])


@triton.jit
def load_gate_row(p_g, s, t, o_k, T):
    """Gates of row t, or of the last row if t is past the end."""
    return tl.load(p_g + tl.minimum(t, T - 1) * s + o_k)[None, :]


@triton.jit
def first_gate(p_g, s, o_k, T):
    """g_0: the gate of the chunk's first token, made whole so that its factor rounds nothing."""
    return tl.ceil(load_gate_row(p_g, s, 0, o_k, T))


@triton.jit
def diagonal_products(b_q, b_k, b_g, p_g, s, o_t, o_k, T, unit, b_Q, b_G, DOT: tl.constexpr):
    """Add q k^T on and below, k k^T below the diagonal of a [16, 16] block.

    What is added above it is finite and without meaning.
    """
    o_i = tl.arange(0, 16)
    r, c = o_i[:, None], o_i[None, :]
    b_0 = tl.zeros([16, 16], tl.float32)
    b_Qs, b_Gs = row_products(b_q, b_k, b_0, DOT), b_0
    for n in tl.range(0, 4, num_stages=1):  # unrolled it would spill
        o_r = ((o_t >> (n + 1)) << (n + 1)) + (1 << n)
        b_qE, b_kE = cut(b_q, b_k, b_g, load_gates(p_g, s, o_r, o_k, T), unit, DOT)
        m_n = ((r >> (n + 1)) == (c >> (n + 1))) & ((r >> n) > (c >> n))
        b_Qs = tl.where(m_n, row_products(b_qE, b_kE, b_0, DOT), b_Qs)
        b_Gs = tl.where(m_n, row_products(b_kE, b_kE, b_0, DOT), b_Gs)
    return b_Q + b_Qs, b_G + b_Gs


@triton.jit
def store_keys(b_k, b_g, b_g0, b_gl, b_b, p_kb, p_kg, s, o_t, o_k, T, unit):
    """kb = KB_SCALE beta exp2(g - g_0) k and kg = exp2(g_last - g) k."""
    b_k = b_k.to(tl.float32)
    o = o_t[:, None] * s + o_k[None, :]
    m_t = (o_t < T)[:, None]
    b_kb = b_k * (decay(b_g, b_g0, unit) * (b_b * KB_SCALE)[:, None])
    tl.store(p_kb + o, b_kb.to(p_kb.dtype.element_ty), mask=m_t)
    tl.store(p_kg + o, (b_k * decay(b_g, b_gl, unit)).to(p_kg.dtype.element_ty), mask=m_t)


@triton.jit
def row_block(
    q, k, p_g, p_b, p_kb, p_kg, s, H, o_t, o_k, T, unit, b_Q, b_G,
    DOT: tl.constexpr, IO: tl.constexpr,
):  # fmt: skip
    """Load rows o_t, store their kb and kg, add the products of the diagonal block.

    Returns the two sums and the rows' operands q, k and gates.
    """
    b_q, b_k = load_rows(q, s, o_t, o_k, T).to(IO), load_rows(k, s, o_t, o_k, T).to(IO)
    b_g = load_gates(p_g, s, o_t, o_k, T)
    b_g0, b_gl = first_gate(p_g, s, o_k, T), load_gate_row(p_g, s, 63, o_k, T)
    b_b = load_gate(p_b, H, o_t, T, True)
    store_keys(b_k, b_g, b_g0, b_gl, b_b, p_kb, p_kg, s, o_t, o_k, T, unit)
    b_q, b_k = operand(b_q, DOT), operand(b_k, DOT)
    b_Q, b_G = diagonal_products(b_q, b_k, b_g, p_g, s, o_t, o_k, T, unit, b_Q, b_G, DOT)
    return b_Q, b_G, b_q, b_k, b_g


@triton.jit
def left_block(
    k, p_g, b_r, b_q, b_k, s, o_t, o_k, T, unit, b_Q, b_G, DOT: tl.constexpr, IO: tl.constexpr
):  # fmt: skip
    """Add the products of q and k, cut at gates r, and the earlier rows o_t, cut there as well."""
    b_kj = operand(load_rows(k, s, o_t, o_k, T).to(IO), DOT)
    b_kj = b_kj * operand(decay(load_gates(p_g, s, o_t, o_k, T), b_r, unit), DOT)
    return row_products(b_q, b_kj, b_Q, DOT), row_products(b_k, b_kj, b_G, DOT)


@triton.jit
def below_diagonal(b_G, b_b):
    """-beta_i G_ij of a diagonal block."""
    o_i = tl.arange(0, 16)
    return tl.where(o_i[:, None] > o_i[None, :], b_G * -b_b[:, None], 0.0)


@triton.jit
def on_and_below_diagonal(b_Q, scale):
    o_i = tl.arange(0, 16)
    return tl.where(o_i[:, None] >= o_i[None, :], b_Q * scale, 0.0)
