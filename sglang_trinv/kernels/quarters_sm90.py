"""[8, 8] quarters of a [16, 16] block for Hopper: two in one instruction of the tensor core.

Each is two numbers a thread. As the left operand of a product it is what it is as a result; a right
operand is its transpose.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BLOCK = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))  # of a [16, 16] block
QUARTER = gl.constexpr(  # of a block, [8, 8]
    gl.DistributedLinearLayout([[0, 1]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [], [], [8, 8])
)


@gluon.jit
def quarters(b_x):
    """The [8, 8] quarters of a [16, 16] block: upper left, lower left, upper right, lower right."""
    b_l, b_r = gl.split(b_x.reshape((2, 8, 2, 8)).permute((1, 3, 0, 2)))
    b_00, b_10 = gl.split(b_l)
    b_01, b_11 = gl.split(b_r)
    return (
        gl.convert_layout(b_00, QUARTER), gl.convert_layout(b_10, QUARTER),
        gl.convert_layout(b_01, QUARTER), gl.convert_layout(b_11, QUARTER),
    )  # fmt: skip


@gluon.jit
def block(b_00, b_10, b_01, b_11):
    """The [16, 16] block of these quarters."""
    b_x = gl.join(gl.join(b_00, b_10), gl.join(b_01, b_11))
    return gl.convert_layout(b_x.permute((2, 0, 3, 1)).reshape((16, 16)), BLOCK)


@gluon.jit
def transposed(b_x):
    """The transpose of each quarter of 16-bit numbers, in registers."""
    asm: gl.constexpr = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    return gl.inline_asm_elementwise(asm, "=r,r", [b_x], b_x.dtype, True, 2)


@gluon.jit
def parts(b_x, DOT: gl.constexpr):
    """The fp16 number next to each and, where DOT is "fp16x2", that of what is left."""
    b_high = b_x.to(gl.float16)
    b_low = b_high
    if DOT == "fp16x2":
        b_low = (b_x - b_high.to(gl.float32)).to(gl.float16)
    return b_high, b_low


@gluon.jit
def transposed_parts(b_x, DOT: gl.constexpr):
    """The parts of a quarter, transposed: the right operand of ``add_parts``."""
    b_high, b_low = parts(b_x, DOT)
    return transposed(b_high), transposed(b_low)


@gluon.jit
def kept(b_x, b_mask):
    """The fp16 numbers of a quarter whose mask is -1, zero where it is 0."""
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, $2;", "=r,r,r", [b_x, b_mask], gl.float16, True, 2
    )


@gluon.jit
def kept_parts(t_x, b_mask):
    return kept(t_x[0], b_mask), kept(t_x[1], b_mask)


@gluon.jit
def two_products(b_x, b_y, t_x, t_y, acc_x, acc_y):
    """acc_x + x t_x^T and acc_y + y t_y^T of quarters in fp16, in one instruction."""
    asm: gl.constexpr = (
        "{ .reg .b32 z; mov.b32 z, 0;"
        " mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        " {$0, $1, $2, $3}, {$4, z, z, $5}, {$6, $7}, {$8, $9, $10, $11}; }"
    )
    return gl.inline_asm_elementwise(
        asm, "=f,=f,=f,=f,r,r,r,r,f,f,f,f", [b_x, b_y, t_x, t_y, acc_x, acc_y],
        (gl.float32, gl.float32), True, 2,
    )  # fmt: skip


@gluon.jit
def join_levels(b_E, t_E, b_F, t_F, b_M, t_M, b_N, t_N, DOT: gl.constexpr):
    """One step of MBH on two quarters: E + (I + E) M (I + E), likewise F with N.

    t_E and t_F are transposed; t_M and t_N are the parts of M and N, transposed.
    """
    b_Y, b_Z = add_parts(b_M, b_N, b_E.to(gl.float16), b_F.to(gl.float16), t_M, t_N, DOT)
    return add_product(b_E + b_Y, b_F + b_Z, b_Y, b_Z, t_E, t_F, DOT)


@gluon.jit
def add_parts(acc_x, acc_y, b_e, b_f, t_M, t_N, DOT: gl.constexpr):
    """acc_x + e M and acc_y + f N; t_M and t_N are the parts of M and N, transposed."""
    acc_x, acc_y = two_products(b_e, b_f, t_M[0], t_N[0], acc_x, acc_y)
    if DOT == "fp16x2":
        acc_x, acc_y = two_products(b_e, b_f, t_M[1], t_N[1], acc_x, acc_y)
    return acc_x, acc_y


@gluon.jit
def add_product(acc_x, acc_y, b_Y, b_Z, t_E, t_F, DOT: gl.constexpr):
    """acc_x + Y E and acc_y + Z F; t_E and t_F are transposed."""
    b_y, b_z = parts(b_Y, DOT), parts(b_Z, DOT)
    acc_x, acc_y = two_products(b_y[0], b_z[0], t_E, t_F, acc_x, acc_y)
    if DOT == "fp16x2":
        acc_x, acc_y = two_products(b_y[1], b_z[1], t_E, t_F, acc_x, acc_y)
    return acc_x, acc_y


@gluon.jit
def inv_8(b_M, t_M, b_N, t_N, DOT: gl.constexpr):
    """X - I of two quarters by MBH; t_M and t_N: their transposed parts."""
    r = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(1, QUARTER)), 1)
    c = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, QUARTER)), 0)
    two, four = (r >> 1) == (c >> 1), (r >> 2) == (c >> 2)
    m_2 = gl.where(two, -1, 0).to(gl.int16)
    m_4 = gl.where(four & ~two, -1, 0).to(gl.int16)
    m_8 = gl.where(four, 0, -1).to(gl.int16)
    b_E, b_F = gl.where(two, b_M, 0.0), gl.where(two, b_N, 0.0)
    b_E, b_F = join_levels(
        b_E, kept(t_M[0], m_2), b_F, kept(t_N[0], m_2),
        gl.where(four & ~two, b_M, 0.0), kept_parts(t_M, m_4),
        gl.where(four & ~two, b_N, 0.0), kept_parts(t_N, m_4), DOT,
    )  # fmt: skip
    return join_levels(
        b_E, transposed(b_E.to(gl.float16)), b_F, transposed(b_F.to(gl.float16)),
        gl.where(four, 0.0, b_M), kept_parts(t_M, m_8),
        gl.where(four, 0.0, b_N), kept_parts(t_N, m_8), DOT,
    )  # fmt: skip
