"""(I + A)^-1 for a strictly lower A in memory, for Hopper: solve_tril_kernel in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from sglang_trinv.kernels.blocks_sm90 import COLUMNS, ROWS, inv_16, merge_64, with_identity
from sglang_trinv.kernels.chunk_sm90 import locate, put, store_blocks


@gluon.jit
def load_block(p, stride, I: gl.constexpr, J: gl.constexpr, n):
    """-A of block (I, J) as float32, strictly below the diagonal."""
    o_i = gl.expand_dims(gl.arange(0, 16, ROWS), 1)
    o_j = gl.expand_dims(gl.arange(0, 16, COLUMNS), 0)
    kept = (o_i + 16 * I < n) & (o_j >= 0)
    if I == J:
        kept = kept & (o_i > o_j)
    return -gl.load(p + (o_i + 16 * I) * stride + 16 * J + o_j, mask=kept, other=0.0).to(gl.float32)


@gluon.jit(
    do_not_specialize=["T", "N", "per_row"],
    do_not_specialize_on_alignment=["cu_seqlens", "chunk_indices"],
)
def solve_tril_kernel_sm90(
    A, Ai_desc, Ai, cu_seqlens, chunk_indices, T, N, per_row,
    H: gl.constexpr, DOT: gl.constexpr, VARLEN: gl.constexpr,
):  # fmt: skip
    """One program, one warp: a chunk of 64 rows of one head. DOT is "fp16" or "fp16x2".

    A and Ai [B, T, H, 64]; Ai_desc [B T, H 64] in tiles of [64, 64], of a 16-bit type.
    """
    i_h = gl.program_id(0) % H
    row, n = locate(cu_seqlens, chunk_indices, gl.program_id(0) // H, T, N, per_row, VARLEN)
    if n <= 0:
        return
    s_A = gl.allocate_shared_memory(Ai_desc.dtype, [64, 64], Ai_desc.layout)
    p, s = A + (row.to(gl.int64) * H + i_h) * 64, H * 64
    N00, N11 = load_block(p, s, 0, 0, n), load_block(p, s, 1, 1, n)
    N22, N33 = load_block(p, s, 2, 2, n), load_block(p, s, 3, 3, n)
    N10, N20, N21 = load_block(p, s, 1, 0, n), load_block(p, s, 2, 0, n), load_block(p, s, 2, 1, n)
    N30, N31, N32 = load_block(p, s, 3, 0, n), load_block(p, s, 3, 1, n), load_block(p, s, 3, 2, n)
    E00, b_E00, E11, b_E11 = inv_16(N00, N11, DOT)
    E22, b_E22, E33, _ = inv_16(N22, N33, DOT)
    X10, X20, X21, X30, X31, X32 = merge_64(
        E11, E22, E33, b_E00, b_E11, b_E22, N10, N20, N21, N30, N31, N32, DOT
    )  # fmt: skip
    store_blocks(s_A, with_identity((E00, X10, E11, X20, X21, E22, X30, X31, X32, E33)))
    put(Ai_desc, Ai, s_A, row, i_h * 64, n, H * 64)
    tma.store_wait(0)
