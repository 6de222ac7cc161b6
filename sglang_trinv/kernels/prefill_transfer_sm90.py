"""The transfer pass for Hopper, in Gluon: prefill_state_sm90 without queries and outputs."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang_trinv.kernels.prefill_tiles_sm90 import (
    barrier,
    chunk_factors,
    factor,
    last_gate,
    locate,
    segment_chunks,
    stage_barriers,
)


@gluon.jit
def load_segment(
    k, v, inverses, factors, s_k, s_v, s_A, s_f, full, free, row, tile, NT, c_k, c_v,
    H: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: copy chunk after chunk into shared memory, as far ahead as there is room."""
    size: gl.constexpr = (
        k.block_type.nbytes + v.block_type.nbytes + inverses.block_type.nbytes
        + factors.block_type.nbytes
    )  # fmt: skip
    for i_t in range(NT):
        e = i_t % STAGES
        bar = full.index(e)
        mbarrier.wait(free.index(e), ((i_t // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, size)
        tma.async_copy_global_to_shared(k, [row, c_k], bar, s_k.index(e))
        tma.async_copy_global_to_shared(factors, [tile * 6, 0], bar, s_f.index(e))
        tma.async_copy_global_to_shared(v, [row, c_v], bar, s_v.index(e))
        tma.async_copy_global_to_shared(inverses, [tile * 64, 0], bar, s_A.index(e))
        row += 64
        tile += H


@gluon.jit
def run_segment(
    ends, s_k, s_v, s_A, s_f, full, free, NT, i_ns, i_h, i_v,
    H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows of [L; M] through NT whole chunks."""
    mma_t: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    mma_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma_t, 2)
    left_k: gl.constexpr = gl.DotOperandLayout(0, mma_k, 2)
    dtype: gl.constexpr = s_k.dtype
    o_v = gl.expand_dims(i_v * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma_k)), 1)
    o_k = gl.expand_dims(gl.arange(0, K, gl.SliceLayout(0, mma_k)), 0)
    b_S = gl.where(o_v - V == o_k, 1.0, 0.0)
    zeros = gl.zeros([64, 64], gl.float32, mma_t)
    has_v = i_v < V // 64

    for i_t in range(NT):
        e = i_t % STAGES
        b_h = gl.convert_layout(b_S.to(dtype), left)
        mbarrier.wait(full.index(e), (i_t // STAGES) & 1)
        t_X = warpgroup_mma(b_h, s_k.index(e).permute((1, 0)), zeros, use_acc=False, is_async=True)
        barrier()
        mbarrier.arrive(free.index((i_t + STAGES - 1) % STAGES), pred=i_t > 0)
        f = chunk_factors(s_f.index(e))
        b_b = factor(f, 1, mma_t)
        b_v = s_v.index(e).permute((1, 0)).load(mma_t).to(gl.float32)
        b_v = gl.where(has_v, b_v, 0.0) * b_b
        b_a = factor(f, 0, mma_t)
        b_X = warpgroup_mma_wait(0, [t_X])
        b_D = gl.convert_layout((b_v - b_X * b_a).to(dtype), left)
        t_U = warpgroup_mma(b_D, s_A.index(e).permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_S = b_S * last_gate(f, mma_k)
        b_e = factor(f, 2, mma_t)
        b_U = warpgroup_mma_wait(0, [t_U])
        b_U = gl.convert_layout((b_U * b_e).to(dtype), left_k)
        t_S = warpgroup_mma(b_U, s_k.index(e), b_S, is_async=True)
        b_S = warpgroup_mma_wait(0, [t_S])
    p_e = ends + (i_ns.to(gl.int64) * H + i_h) * ((V + K) * K)
    gl.store(p_e + (o_v * K + o_k), b_S)


@gluon.jit(do_not_specialize=["T", "G"], do_not_specialize_on_alignment=["cu_seqlens"])
def transfer_kernel_sm90(
    k, v, inverses, factors, ends, cu_seqlens, T, G,
    H: gl.constexpr, Hg: gl.constexpr, K: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr,
    VARLEN: gl.constexpr,
):  # fmt: skip
    """As prefill_segments.transfer_kernel: the same arithmetic, other instructions.

    One program: 64 rows of one segment and value head. Descriptors as in state_kernel_sm90.
    """
    gdc_wait()
    gdc_launch_dependents()
    dtype: gl.constexpr = k.dtype
    i_v, i_h, i_ns = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    i_n = i_ns // (G - 1)
    bos, n_tokens, slot = locate(cu_seqlens, i_n, T, VARLEN)
    i_t0, NT = segment_chunks(i_ns % (G - 1), n_tokens, G)
    if (i_t0 + NT) * 64 >= n_tokens:
        return
    s_k = gl.allocate_shared_memory(dtype, [STAGES, 64, K], k.layout)
    s_v = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], v.layout)
    s_A = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], inverses.layout)
    s_f = gl.allocate_shared_memory(gl.float32, [STAGES, 8, 64], factors.layout)
    full, free = stage_barriers(STAGES, 1), stage_barriers(STAGES, 1)
    fence_async_shared()
    barrier()
    row = bos + i_t0 * 64
    tile = (slot + i_t0) * H + i_h
    c_k = i_h // (H // Hg) * K
    c_v = i_h * V + i_v % (V // 64) * 64
    gl.warp_specialize([
        (run_segment, (
            ends, s_k, s_v, s_A, s_f, full, free, NT, i_ns, i_h, i_v, H, K, V, STAGES,
        )),
        (load_segment, (
            k, v, inverses, factors, s_k, s_v, s_A, s_f, full, free, row, tile, NT, c_k, c_v, H,
            STAGES,
        )),
    ], [1], [24])  # fmt: skip
