"""The scores for Hopper, in Gluon, by a warpgroup of the state pass (prefill_state_sm90)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sglang_trinv.kernels.prefill_prepare import L2NORM_EPS
from sglang_trinv.kernels.prefill_tiles_sm90 import barrier, chunk_factors, read_place


@gluon.jit
def square_sum(s, mma: gl.constexpr):
    """The squares of each row of a tile, summed."""
    x = s.load(mma).to(gl.float32)
    return gl.sum(x * x, 1)


@gluon.jit
def score_chunks(
    s_q, s_k, s_P, s_f, full, full_P, scale, n_tokens, NT, past, STAGES: gl.constexpr,
    NORM: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """One warpgroup: P of chunk after chunk and the queries' factors (see scores_kernel).

    Rows past the end of the sequence may hold anything: nobody stores what is made of them.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    i: gl.constexpr = gl.SliceLayout(1, mma)
    j: gl.constexpr = gl.SliceLayout(0, mma)
    o_i, o_j = gl.arange(0, 64, i), gl.expand_dims(gl.arange(0, N, j), 0)
    zeros = gl.zeros([64, N], gl.float32, mma)
    for i_t in range(NT):
        x = past + i_t
        e = x % STAGES
        s_q0, s_q1, f = s_q.index(e * 2), s_q.index(e * 2 + 1), chunk_factors(s_f.index(e))
        mbarrier.wait(full.index(e), (x // STAGES) & 1)
        b_r = gl.full([64], 1.0, gl.float32, i)
        if NORM:
            b_r = gl.rsqrt(square_sum(s_q0, mma) + square_sum(s_q1, mma) + L2NORM_EPS)
        b_r *= scale
        b_g = f.slice(256, 64).load(i)
        f.slice(192, 64).store(b_r * gl.exp2(b_g))
        n = n_tokens - i_t * 64
        for c in gl.static_range(0, 64, N):
            s_kc = s_k.index(e).slice(c, N, 0)
            s_k0, s_k1 = s_kc.slice(0, 64, 1), s_kc.slice(64, 64, 1)
            b_G = warpgroup_mma(s_q0, s_k0.permute((1, 0)), zeros, use_acc=False, is_async=True)
            b_G = warpgroup_mma(s_q1, s_k1.permute((1, 0)), b_G, is_async=True)
            g_c = gl.expand_dims(f.slice(256 + c, N).load(j), 0)
            r_c = gl.expand_dims(f.slice(320 + c, N).load(j), 0)
            b_d = gl.exp2(gl.minimum(gl.expand_dims(b_g, 1) - g_c, 0.0))
            kept = (gl.expand_dims(o_i, 1) >= o_j + c) & (o_j + c < n)
            b_G = warpgroup_mma_wait(0, [b_G])
            b_P = gl.where(kept, b_G * (r_c * gl.expand_dims(b_r, 1)) * b_d, 0.0)
            s_P.index(e).slice(c, N, 1).store(b_P.to(s_P.dtype))
        fence_async_shared()
        barrier()
        mbarrier.arrive(full_P.index(e))


@gluon.jit
def score_items(
    s_q, s_k, s_P, s_f, s_m, full, full_P, scale, items, STAGES: gl.constexpr, NORM: gl.constexpr,
    N: gl.constexpr,
):  # fmt: skip
    """One warpgroup: the scores of item after item (see state_kernel_sm90)."""
    past, n = 0, 0
    item, _, _, left, _, NT, _ = read_place(s_m, n)
    while item < items:
        score_chunks(s_q, s_k, s_P, s_f, full, full_P, scale, left, NT, past, STAGES, NORM, N)
        past += NT
        n += 1
        item, _, _, left, _, NT, _ = read_place(s_m, n)
