"""The state pass for Hopper, in Gluon: TMA, asynchronous wgmma, operands kept in registers.

With OWN_SCORES one more warpgroup computes the scores, which then never are in global memory. It
delays the others: where memory is not what limits, scores_kernel before is faster.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.extra.cuda import gdc_wait

from sglang_trinv.kernels.prefill_items_sm90 import run_items
from sglang_trinv.kernels.prefill_scores_sm90 import score_items
from sglang_trinv.kernels.prefill_tiles_sm90 import (
    PLACES,
    barrier,
    load_tiles,
    put_place,
    stage_barriers,
)


@gluon.jit
def share_out(
    half_0, half_1, scores, tiles, HALVES: gl.constexpr, OWN_SCORES: gl.constexpr,
    CHUNKS_REGS: gl.constexpr, SCORES_REGS: gl.constexpr,
):  # fmt: skip
    """Run each part with its arguments: a warpgroup each, with so many registers a thread."""
    if HALVES == 2 and OWN_SCORES:
        gl.warp_specialize(
            [
                (run_items, half_0), (run_items, half_1), (score_items, scores),
                (load_tiles, tiles),
            ],
            [4, 4, 1], [CHUNKS_REGS, SCORES_REGS, 24],
        )  # fmt: skip
    elif HALVES == 2:
        gl.warp_specialize(
            [(run_items, half_0), (run_items, half_1), (load_tiles, tiles)],
            [4, 1], [CHUNKS_REGS, 24],
        )  # fmt: skip
    elif OWN_SCORES:
        gl.warp_specialize(
            [(run_items, half_0), (score_items, scores), (load_tiles, tiles)],
            [4, 1], [SCORES_REGS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize([(run_items, half_0), (load_tiles, tiles)], [1], [24])


@gluon.jit(
    do_not_specialize=["T", "G", "items"],
    do_not_specialize_on_alignment=["cu_seqlens", "state_indices", "track_chunks"],
)
def state_kernel_sm90(
    q, k, v, inverses, scores, factors, o_desc, o, h, state, state_indices, starts, track,
    track_chunks, marks, cu_seqlens, scale, T, G, items, s_state,
    H: gl.constexpr, Hg: gl.constexpr, K: gl.constexpr, V: gl.constexpr, HALVES: gl.constexpr,
    STAGES: gl.constexpr, VARLEN: gl.constexpr, HAS_STATE: gl.constexpr,
    HAS_INDICES: gl.constexpr, HAS_STARTS: gl.constexpr, WRITE_STATE: gl.constexpr,
    STORE_H: gl.constexpr, TRACK: gl.constexpr, NORM: gl.constexpr, OWN_SCORES: gl.constexpr,
    CHUNKS_REGS: gl.constexpr, SCORES_REGS: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """As prefill_state.state_kernel: the same arithmetic, other instructions.

    One item: 64 HALVES rows of the state of one value head through one segment of a sequence. A
    program takes item after item, first its own number, then the one that marks[0] (int32, 0 at
    first) counts, with a warpgroup for each 64 rows, one for the scores with OWN_SCORES, and one
    warp that copies, ahead into the next item. With BESIDE the scores are computed meanwhile: see
    scores_kernel for the other marks. Tensor descriptors (bfloat16 or float16 unless said) in tiles
    of [64, 64]: q and k [T, Hg K], v and o_desc [T, H V], inverses and scores [slots H 64, 64]; in
    tiles of [8, 64]: factors, float32 [slots H 6, 64]. STAGES is the number of copies in flight.
    """
    dtype: gl.constexpr = k.dtype
    s_k = gl.allocate_shared_memory(dtype, [STAGES, 64, 128], k.layout)
    s_v = gl.allocate_shared_memory(dtype, [STAGES * HALVES, 64, 64], v.layout)
    s_A = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], inverses.layout)
    s_f = gl.allocate_shared_memory(gl.float32, [STAGES, 8, 64], factors.layout)
    s_q = gl.allocate_shared_memory(dtype, [STAGES * 2, 64, 64], q.layout)
    s_P = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], inverses.layout)
    s_o = gl.allocate_shared_memory(dtype, [HALVES, 64, 64], o_desc.layout)
    full, full_P = stage_barriers(STAGES, 1), stage_barriers(STAGES, 1)
    free = stage_barriers(STAGES, HALVES)
    PARTS: gl.constexpr = V // (HALVES * 64)
    if not BESIDE:
        gdc_wait()
    s_m = gl.allocate_shared_memory(gl.int32, [PLACES, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    put_place(
        s_m, 0, gl.program_id(0), marks, cu_seqlens, state_indices, T, G, items, H, PARTS, VARLEN,
        HAS_INDICES,
    )  # fmt: skip
    fence_async_shared()
    barrier()

    share_out(
        (
            o_desc, o, h, state, starts, track, track_chunks, cu_seqlens, s_q, s_k, s_v, s_A,
            s_P, s_f, s_o, s_m, full, full_P, free, T, G, items, s_state, H, V, STAGES, HALVES,
            VARLEN, HAS_STATE, HAS_STARTS, WRITE_STATE, STORE_H, TRACK, 0,
        ),
        (
            o_desc, o, h, state, starts, track, track_chunks, cu_seqlens, s_q, s_k, s_v, s_A,
            s_P, s_f, s_o, s_m, full, full_P, free, T, G, items, s_state, H, V, STAGES, HALVES,
            VARLEN, HAS_STATE, HAS_STARTS, WRITE_STATE, STORE_H, TRACK, 1,
        ),
        (s_q, s_k, s_P, s_f, s_m, full, full_P, scale, items, STAGES, NORM, 64 // HALVES),
        (
            q, k, v, inverses, scores, factors, state, state_indices, starts, marks, cu_seqlens,
            s_q, s_k, s_v, s_A, s_P, s_f, s_m, full, full_P, free, T, G, items, s_state,
            H, Hg, V, STAGES, HALVES, VARLEN, HAS_STATE, HAS_INDICES, HAS_STARTS, OWN_SCORES,
            BESIDE,
        ),
        HALVES, OWN_SCORES, CHUNKS_REGS, SCORES_REGS,
    )  # fmt: skip
