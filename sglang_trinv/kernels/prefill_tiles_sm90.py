"""What the Hopper kernels of the prefill share: where a chunk is, its tiles in shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in Triton 3.7


@gluon.jit
def clear_rows(s, n):
    """Zero the rows of a tile from row n on: they belong to another sequence."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    o_t = gl.arange(0, 64, gl.SliceLayout(1, layout))
    x = s.load(layout)
    s.store(gl.where(gl.expand_dims(o_t < n, 1), x, gl.zeros_like(x)))


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
