"""bfloat16 in Triton's interpreter, as the CPU platform provides it, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

bfloat16 = pytest.importorskip("sglang_trinv_cpu_platform.bfloat16")

# infinities come and go on purpose
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HARD = (
    [0.0, -0.0, 1.0, -1.0, 3.1415927, 1e-40, -1e-40, 3.3e38, float("inf"), float("-inf")]
    + [float("nan"), 1 + 2**-8, 1 + 2**-8 + 2**-20, 1 + 3 * 2**-8, 65504.0, 2.0**-133]
)  # fmt: skip


@pytest.fixture(autouse=True)
def uninstall():
    undo = bfloat16.install()
    yield undo
    undo()


def bits(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns, every NaN made the same."""
    return torch.where(x.isnan(), torch.tensor(0x7FC0), x.view(torch.int16).int())


def samples(n: int, seed: int) -> torch.Tensor:
    """Values of all magnitudes, the hard ones first."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(n, generator=generator) * 2 ** (
        torch.rand(n, generator=generator) * 60 - 30
    )
    spread[: len(HARD)] = torch.tensor(HARD)
    return spread


def elementwise(kernel):
    """Run ``kernel`` over 1024 elements of tensors; the last argument is written."""

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        InterpretedFunction(kernel)[(1,)](*tensors)
        return tensors[-1]

    return call


def _cast(x, y):
    o = tl.arange(0, 1024)
    tl.store(y + o, tl.load(x + o).to(y.dtype.element_ty))


def _add_mul(x, y, z):
    o = tl.arange(0, 1024)
    b_x, b_y = tl.load(x + o), tl.load(y + o)
    tl.store(z + o, (b_x + b_y) * b_x - b_y)


def _compare(x, y, z):
    o = tl.arange(0, 1024)
    b_x, b_y = tl.load(x + o), tl.load(y + o)
    tl.store(z + o, tl.where(b_x < b_y, b_x, b_y))


def _scalar(x, z):
    o = tl.arange(0, 1024)
    tl.store(z + o, -tl.load(x + o) * 0.5 + 1.25)


def _fma(x, y, z):
    o = tl.arange(0, 1024)
    b_x = tl.load(x + o)
    tl.store(z + o, tl.fma(b_x, tl.load(y + o), b_x))


def _constant(z):
    o = tl.arange(0, 1024)
    tl.store(z + o, tl.full([1024], 1.7, tl.bfloat16))


def _masked(x, z):
    o = tl.arange(0, 1024)
    tl.store(z + o, tl.load(x + o, mask=o < 100, other=2.5))


def _dot(a, b, c):
    i, j = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    b_a, b_b = tl.load(a + i * 32 + j), tl.load(b + i * 32 + j)
    tl.store(c + i * 32 + j, tl.dot(b_a, b_b))


def test_widen_and_narrow_all_patterns():
    patterns = np.arange(2**16, dtype=np.uint16)
    values = bfloat16.widen(patterns)
    want = torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(values, want)
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(bfloat16.narrow(values)[finite], patterns[finite])
    assert (bfloat16.narrow(values)[~finite] == bfloat16.QUIET_NAN).all()


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.float64, torch.int32])
def test_cast_to_bfloat16_rounds_as_torch(source):
    x = samples(1024, 0)
    x = (x.nan_to_num(0, 0, 0).clamp(-1e6, 1e6) if source == torch.int32 else x).to(source)
    got = elementwise(_cast)(x, torch.empty(1024, dtype=torch.bfloat16))
    assert torch.equal(bits(got), bits(x.to(torch.float32).to(torch.bfloat16)))


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.float64])
def test_cast_from_bfloat16(target):
    x = samples(1024, 1).to(torch.bfloat16)
    got = elementwise(_cast)(x, torch.empty(1024, dtype=target))
    assert torch.equal(got.nan_to_num(7.0), x.to(target).nan_to_num(7.0))


def test_cast_to_integer():
    x = samples(1024, 1).nan_to_num(0, 0, 0).clamp(-1e6, 1e6).to(torch.bfloat16)
    got = elementwise(_cast)(x, torch.empty(1024, dtype=torch.int32))
    assert torch.equal(got, x.to(torch.int32))


def test_arithmetic_rounds_after_every_operation():
    x, y = samples(1024, 2).to(torch.bfloat16), samples(1024, 3).to(torch.bfloat16)
    got = elementwise(_add_mul)(x, y, torch.empty_like(x))
    assert torch.equal(bits(got), bits((x + y) * x - y))


def test_comparison_and_select():
    x, y = samples(1024, 4).to(torch.bfloat16), samples(1024, 5).to(torch.bfloat16)
    got = elementwise(_compare)(x, y, torch.empty_like(x))
    assert torch.equal(bits(got), bits(torch.where(x < y, x, y)))


def test_python_scalars():
    x = samples(1024, 6).to(torch.bfloat16)
    got = elementwise(_scalar)(x, torch.empty_like(x))
    assert torch.equal(bits(got), bits(-x * 0.5 + 1.25))


def test_fma_rounds_once():
    x, y = samples(1024, 7).to(torch.bfloat16), samples(1024, 8).to(torch.bfloat16)
    got = elementwise(_fma)(x, y, torch.empty_like(x))
    assert torch.equal(bits(got), bits((x.float() * y.float() + x.float()).to(torch.bfloat16)))


def test_constant():
    got = elementwise(_constant)(torch.empty(1024, dtype=torch.bfloat16))
    assert torch.equal(got, torch.full((1024,), 1.7, dtype=torch.bfloat16))


def test_masked_load_fills_with_the_value():
    x = samples(1024, 9).to(torch.bfloat16)
    got = elementwise(_masked)(x, torch.empty_like(x))
    want = torch.where(torch.arange(1024) < 100, x, torch.tensor(2.5, dtype=torch.bfloat16))
    assert torch.equal(bits(got), bits(want))


def test_dot_accumulates_in_float32():
    generator = torch.Generator().manual_seed(10)
    a, b = (torch.randn(32, 32, generator=generator).to(torch.bfloat16) for _ in range(2))
    got = elementwise(_dot)(a, b, torch.empty(32, 32))
    exact = a.double() @ b.double()
    # 32 products exact in float32, then sums: a few roundings of 2^-24
    assert (got - exact).norm() / exact.norm() < 1e-6


def test_dot_passes_nan_on():
    a = torch.eye(32, dtype=torch.bfloat16)
    b = torch.ones(32, 32, dtype=torch.bfloat16)
    b[3, 5] = float("nan")
    got = elementwise(_dot)(a, b, torch.empty(32, 32))
    assert got[:, 5].isnan().all()
    assert not got[:, 4].isnan().any()


def test_without_it_the_dot_is_wrong(uninstall):
    bfloat16.install()  # a second time does nothing
    uninstall()
    a = torch.ones(32, 32, dtype=torch.bfloat16)
    got = elementwise(_dot)(a, a, torch.empty(32, 32))
    assert (got - 32).abs().max() > 1e6
