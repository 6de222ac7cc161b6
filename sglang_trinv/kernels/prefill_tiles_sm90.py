"""What the Hopper kernels of the prefill share: where a chunk is, its tiles in shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in Triton 3.7
PLACES = gl.constexpr(8)  # items written down at once: more than there are stages


@gluon.jit
def clear_rows(s, n):
    """Zero the rows of a tile from row n on: they belong to another sequence."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    o_t = gl.arange(0, 64, gl.SliceLayout(1, layout))
    x = s.load(layout)
    s.store(gl.where(gl.expand_dims(o_t < n, 1), x, gl.zeros_like(x)))


@gluon.jit
def store_rows(p, stride, s, n):
    """Store the rows of a tile before row n, 16 bytes a thread: its last ones may be another's."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    o_r = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, layout)), 1)
    o_c = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
    gl.store(p + o_r * stride + o_c, s.load(layout), mask=(o_r < n) & (o_c >= 0))


@gluon.jit
def locate(cu_seqlens, i_n, T, VARLEN: gl.constexpr):
    """As prefill_state.locate_sequence."""
    if VARLEN:
        bos = gl.load(cu_seqlens + i_n).to(gl.int32)
        return bos, gl.load(cu_seqlens + i_n + 1).to(gl.int32) - bos, bos // 64 + i_n
    else:
        return i_n * T, T, i_n * (T // 64 + 1)


@gluon.jit
def segment_chunks(i_s, n_tokens, G):
    """(first chunk, number of chunks, if any) of segment ``i_s``: see prefill_state.segment."""
    NT = (n_tokens + 63) // 64
    size = (NT + G - 1) // G
    return i_s * size, gl.minimum(size, NT - i_s * size)


@gluon.jit
def locate_item(
    item, cu_seqlens, state_indices, T, G, H: gl.constexpr, PARTS: gl.constexpr,
    VARLEN: gl.constexpr, HAS_INDICES: gl.constexpr,
):  # fmt: skip
    """(first chunk, row, tokens left, slot of its first chunk, chunks, state) of an item."""
    i_ns = item // (PARTS * H)
    i_n = i_ns // G
    bos, n_tokens, slot = locate(cu_seqlens, i_n, T, VARLEN)
    i_t0, NT = segment_chunks(i_ns % G, n_tokens, G)
    index = i_n
    if HAS_INDICES:
        index = gl.load(state_indices + i_n).to(gl.int32)
    return i_t0, bos + i_t0 * 64, n_tokens - i_t0 * 64, slot + i_t0, NT, index


@gluon.jit
def take_item(marks, items):
    """The next item that nobody has, ``items`` or more if there is none.

    All programs have one at first: so batches of any lengths keep all of them busy to the end.
    """
    item = items
    if gl.num_programs(0) < items:
        item = gl.atomic_add(marks, 1, sem="relaxed") + gl.num_programs(0)
    return item


@gluon.jit
def put_place(
    s_m, n, item, marks, cu_seqlens, state_indices, T, G, items, H: gl.constexpr,
    PARTS: gl.constexpr, VARLEN: gl.constexpr, HAS_INDICES: gl.constexpr,
):  # fmt: skip
    """Write down the n-th item of this program: ``item`` or, if it has no chunks, another."""
    i_t0, row, left, slot, NT, index = 0, 0, 0, 0, 0, 0
    while (item < items) & (NT <= 0):
        i_t0, row, left, slot, NT, index = locate_item(
            item, cu_seqlens, state_indices, T, G, H, PARTS, VARLEN, HAS_INDICES
        )
        if NT <= 0:
            item = take_item(marks, items)
    i = gl.arange(0, 8, gl.BlockedLayout([8], [32], [gl.num_warps()], [0]))
    x = gl.where(i == 0, item, gl.where(i == 1, i_t0, gl.where(i == 2, row, left)))
    x = gl.where(i < 4, x, gl.where(i == 4, slot, gl.where(i == 5, NT, index)))
    s_m.index(n % PLACES).store(x)


@gluon.jit
def number(s, I: gl.constexpr):
    x = s.slice(I, 1).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    return gl.max(x, 0)


@gluon.jit
def read_place(s_m, n):
    """The n-th item of this program, and its locate_item."""
    s = s_m.index(n % PLACES)
    return (
        number(s, 0), number(s, 1), number(s, 2), number(s, 3), number(s, 4), number(s, 5),
        number(s, 6),
    )  # fmt: skip


@gluon.jit
def prefetch(p, BYTES: gl.constexpr):
    """Have L2 fetch so many bytes, the address rounded down as the instruction wants it."""
    asm: gl.constexpr = "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;"
    for i in gl.static_range(4):
        address = (p.to(gl.int64) & -16) + i * (BYTES // 4)
        gl.inline_asm_elementwise(asm, "=r,l,r", [address, BYTES // 4], gl.int32, False, 1)


@gluon.jit
def wait_for_scores(p):
    """Wait until another kernel that runs now has stored a chunk's scores, and set ``p``."""
    asm: gl.constexpr = "ld.acquire.gpu.global.b32 $0, [$1];"
    fence: gl.constexpr = "fence.proxy.async.global; mov.b32 $0, 0;"
    done = gl.inline_asm_elementwise(asm, "=r,l", [p.to(gl.int64)], gl.int32, False, 1)
    while done == 0:
        done = gl.inline_asm_elementwise(asm, "=r,l", [p.to(gl.int64)], gl.int32, False, 1)
    gl.inline_asm_elementwise(fence, "=r", [], gl.int32, False, 1)  # they are copied by TMA


@gluon.jit
def load_tiles(
    q, k, v, inverses, scores, factors, state, state_indices, starts, marks, cu_seqlens, s_q, s_k,
    s_v, s_A, s_P, s_f, s_m, full, full_P, free, T, G, items, s_state,
    H: gl.constexpr, Hg: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr,
    HALVES: gl.constexpr, VARLEN: gl.constexpr, HAS_STATE: gl.constexpr,
    HAS_INDICES: gl.constexpr, HAS_STARTS: gl.constexpr, OWN_SCORES: gl.constexpr,
    BESIDE: gl.constexpr,
):  # fmt: skip
    """One warp: copy chunk after chunk into shared memory, as far ahead as there is room.

    Stages go round through all items: stage and phase follow from the chunks there were before.
    Before the last chunk of an item it takes the next one and writes down its place: who waits for
    that chunk finds it. Consumers free an item's last stage when the item ends.
    """
    K: gl.constexpr = 128
    size: gl.constexpr = (5 + HALVES) * q.block_type.nbytes + factors.block_type.nbytes
    PARTS: gl.constexpr = V // (HALVES * 64)
    past, n = 0, 0
    item, _, row, _, slot, NT, index = read_place(s_m, n)
    while item < items:
        i_v, i_h, i_ns = item % PARTS, item // PARTS % H, item // (PARTS * H)
        n += 1
        if past > 0:  # the first item's state is loaded at once
            if HAS_STARTS:
                p_s = starts + ((i_ns.to(gl.int64) * H + i_h) * V + i_v * (HALVES * 64)) * K
                prefetch(p_s, HALVES * 64 * K * 4)
            elif HAS_STATE:
                if index >= 0:
                    p_s = state + index.to(gl.int64) * s_state + (i_h * V + i_v * (HALVES * 64)) * K
                    prefetch(p_s, HALVES * 64 * K * state.dtype.element_ty.primitive_bitwidth // 8)
        tile = slot * H + i_h
        c_k = i_h // (H // Hg) * K
        c_v = i_h * V + i_v * (HALVES * 64)
        for i_t in range(NT):
            x = past + i_t
            e = x % STAGES
            bar = full.index(e)
            if i_t == NT - 1:
                put_place(
                    s_m, n, take_item(marks, items), marks, cu_seqlens, state_indices, T, G, items,
                    H, PARTS, VARLEN, HAS_INDICES,
                )  # fmt: skip
                barrier()
            if BESIDE:
                wait_for_scores(marks + 1 + tile // (H // Hg))
            mbarrier.wait(free.index(e), ((x // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, size)
            tma.async_copy_global_to_shared(k, [row, c_k], bar, s_k.index(e))
            tma.async_copy_global_to_shared(factors, [tile * 6, 0], bar, s_f.index(e))
            for i in gl.static_range(HALVES):
                s_ve = s_v.index(e * HALVES + i)
                tma.async_copy_global_to_shared(v, [row, c_v + i * 64], bar, s_ve)
            for i in gl.static_range(2):
                tma.async_copy_global_to_shared(q, [row, c_k + i * 64], bar, s_q.index(e * 2 + i))
            tma.async_copy_global_to_shared(inverses, [tile * 64, 0], bar, s_A.index(e))
            if not OWN_SCORES:
                bar_P = full_P.index(e)
                mbarrier.expect(bar_P, scores.block_type.nbytes)
                tma.async_copy_global_to_shared(scores, [tile * 64, 0], bar_P, s_P.index(e))
            row += 64
            tile += H
        past += NT
        item, _, row, _, slot, NT, index = read_place(s_m, n)


@gluon.jit
def stage_barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """One barrier a stage, for ``COUNT`` arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def chunk_factors(s):
    """The rows of a chunk's factors, one behind the other."""
    return s._reinterpret(gl.float32, [512], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def factor(s, ROW: gl.constexpr, layout: gl.constexpr):
    return gl.expand_dims(s.slice(ROW * 64, 64).load(gl.SliceLayout(0, layout)), 0)


@gluon.jit
def last_gate(s, layout: gl.constexpr):
    """The decay over the whole chunk, read from shared memory when it is wanted and not before."""
    return gl.exp2(gl.expand_dims(s.slice(319, 1).load(gl.SliceLayout(0, layout)), 0))


@gluon.jit
def scale_values(b_v, b_b):
    """v beta in float32, computed where this stands: the compiler would delay it to its use."""
    asm: gl.constexpr = (
        "{ .reg .b32 x, y; shl.b32 x, $2, 16; and.b32 y, $2, 0xffff0000;"
        " mul.f32 $0, x, $3; mul.f32 $1, y, $4; }"
    )
    if b_v.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(asm, "=r,=r,r,r,r", [b_v, b_b], gl.float32, False, 2)
    else:
        return b_v.to(gl.float32) * b_b
