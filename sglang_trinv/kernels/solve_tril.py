"""(I + A)^-1 for a strictly lower A that lies in memory, one warp per chunk and head."""

import triton
import triton.language as tl

from sglang_trinv.kernels.blocks import (
    add_identity,
    inv_16,
    inv_16_twice,
    merge_32,
    merge_64_or_halves,
)
from sglang_trinv.kernels.chunks import load_rows, locate_chunk, store_block_row


@triton.jit
def load_block(p, stride, o_t, T):
    """-A of a [16, 16] block as float32."""
    return -load_rows(p, stride, o_t, tl.arange(0, 16), T).to(tl.float32)


@triton.jit
def load_diagonal(p, stride, o_t, T):
    """-A of a diagonal block; entries on and above the diagonal are dropped, whatever they are."""
    o_c = tl.arange(0, 16)
    return tl.where(o_c[:, None] > o_c[None, :], load_block(p, stride, o_t, T), 0.0)


@triton.jit(do_not_specialize=["T"])
def solve_tril_kernel(
    A, Ai, cu_seqlens, chunk_indices, T,
    H: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Ai = (I + A)^-1 per chunk of BT rows. A, Ai [B, T, H, BT]; reads the lower blocks only."""
    row, T = locate_chunk(cu_seqlens, chunk_indices, T, BT, VARLEN)
    if T <= 0:
        return
    s = H * BT
    p_A = A + (row * H + tl.program_id(1)) * BT
    p_Ai = Ai + (row * H + tl.program_id(1)) * BT
    o_0 = tl.arange(0, 16)
    b_0 = tl.zeros([16, 16], tl.float32)
    if BT == 16:
        E00 = inv_16(load_diagonal(p_A, s, o_0, T), DOT)
        store_block_row(p_Ai, s, o_0, T, 1, add_identity(E00), b_0, b_0, b_0)
    if BT == 32:
        o_1 = o_0 + 16
        E00 = inv_16(load_diagonal(p_A, s, o_0, T), DOT)
        E11 = inv_16(load_diagonal(p_A + 16, s, o_1, T), DOT)
        X10 = merge_32(E00, E11, load_block(p_A, s, o_1, T), DOT)
        store_block_row(p_Ai, s, o_0, T, 2, add_identity(E00), b_0, b_0, b_0)
        store_block_row(p_Ai, s, o_1, T, 2, X10, add_identity(E11), b_0, b_0)
    if BT == 64:
        o_1, o_2, o_3 = o_0 + 16, o_0 + 32, o_0 + 48
        N00, N22 = load_diagonal(p_A, s, o_0, T), load_diagonal(p_A + 32, s, o_2, T)
        N11, N33 = load_diagonal(p_A + 16, s, o_1, T), load_diagonal(p_A + 48, s, o_3, T)
        E00, E22 = inv_16_twice(N00, N22, DOT)
        E11, E33 = inv_16_twice(N11, N33, DOT)
        # Loaded here, not before: in fewer registers, so that more programs run at once.
        N10, N20, N30 = (
            load_block(p_A, s, o_1, T),
            load_block(p_A, s, o_2, T),
            load_block(p_A, s, o_3, T),
        )
        N21, N31 = load_block(p_A + 16, s, o_2, T), load_block(p_A + 16, s, o_3, T)
        N32 = load_block(p_A + 32, s, o_3, T)
        X10, X20, X21, X30, X31, X32 = merge_64_or_halves(
            E00, E11, E22, E33, N10, N20, N21, N30, N31, N32, DOT
        )  # fmt: skip
        store_block_row(p_Ai, s, o_0, T, 4, add_identity(E00), b_0, b_0, b_0)
        store_block_row(p_Ai, s, o_1, T, 4, X10, add_identity(E11), b_0, b_0)
        store_block_row(p_Ai, s, o_2, T, 4, X20, X21, add_identity(E22), b_0)
        store_block_row(p_Ai, s, o_3, T, 4, X30, X31, X32, add_identity(E33))
