"""Where a program's chunk lies, and loads and stores of its tiles: device functions."""

import triton
import triton.language as tl


@triton.jit
def find_sequence(cu_seqlens, i_s, N, BT: tl.constexpr):
    """The sequence of slot ``i_s``: chunk c of sequence n has slot cu_seqlens[n] // BT + n + c."""
    i_n = -1
    for i_b in range(0, N, 64):
        o_n = i_b + tl.arange(0, 64)
        b_bos = tl.load(cu_seqlens + o_n, mask=o_n < N, other=0).to(tl.int32)
        i_n += tl.sum(((b_bos // BT + o_n <= i_s) & (o_n < N)).to(tl.int32))
    return i_n


@triton.jit
def locate_chunk(cu_seqlens, chunk_indices, T, BT: tl.constexpr, VARLEN: tl.constexpr):
    """(row of the chunk's first token as int64, tokens from there to the sequence's end).

    Program axes: 0 chunk, 2 batch. Without chunk_indices a ragged batch has T // BT + N slots, as
    ops.chunks.chunk_grid counts them. The second result is <= 0 for a slot without a chunk and for
    a padding row of chunk_indices.
    """
    i_t, i_b = tl.program_id(0), tl.program_id(2)
    if VARLEN:
        if chunk_indices is None:
            i_n = find_sequence(cu_seqlens, i_t, tl.num_programs(0) - T // BT, BT)
            bos = tl.load(cu_seqlens + i_n).to(tl.int64)
            i_t -= (bos // BT).to(tl.int32) + i_n
        else:
            i_n = tl.load(chunk_indices + i_t * 2).to(tl.int32)
            i_t = tl.load(chunk_indices + i_t * 2 + 1).to(tl.int32)
            bos = tl.load(cu_seqlens + i_n).to(tl.int64)
        n = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - bos).to(tl.int32)
    else:
        bos = i_b.to(tl.int64) * T
        n = T
    return bos + i_t.to(tl.int64) * BT, n - i_t * BT


@triton.jit
def load_rows(p, stride, o_t, o_d, T):
    """Rows o_t, columns o_d of a row-major tile; rows past the end are zero."""
    return tl.load(p + o_t[:, None] * stride + o_d[None, :], mask=(o_t < T)[:, None], other=0.0)


@triton.jit
def load_gate(p, stride, o_t, T, ZERO: tl.constexpr):
    """A column of g or beta as float32; rows past the end repeat the last row (g) or are 0 (beta).

    A repeated gate keeps every exponent of a masked row <= 0: zero times infinity never appears.
    """
    b_x = tl.load(p + tl.minimum(o_t, T - 1) * stride).to(tl.float32)
    if ZERO:
        b_x = tl.where(o_t < T, b_x, 0.0)
    return b_x


@triton.jit
def store_block_row(p, stride, o_t, T, N: tl.constexpr, b_0, b_1, b_2, b_3):
    """The first N of four [16, 16] blocks, side by side."""
    e = p.dtype.element_ty
    p_row = p + o_t[:, None] * stride + tl.arange(0, 16)[None, :]
    m_t = (o_t < T)[:, None]
    tl.store(p_row, b_0.to(e), mask=m_t)
    if N > 1:
        tl.store(p_row + 16, b_1.to(e), mask=m_t)
    if N > 2:
        tl.store(p_row + 32, b_2.to(e), mask=m_t)
        tl.store(p_row + 48, b_3.to(e), mask=m_t)
