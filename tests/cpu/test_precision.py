"""Emulated precisions round as torch's types and the tensor core instructions do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_trinv.reference.precision import PRECISIONS, matmul, product, round_tf32, truncate_tf32

FLOAT32 = st.floats(width=32, allow_nan=False)


def operands(*shape: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(*shape, generator=gen) * 10.0 ** torch.randint(-3, 4, shape, generator=gen)


@given(FLOAT32)
def test_16_bit_types_round_as_torch_does(value):
    x = torch.tensor([value])
    assert torch.equal(PRECISIONS["fp16"].round(x), x.half().float())
    assert torch.equal(PRECISIONS["bf16"].round(x), x.bfloat16().float())


@given(FLOAT32)
def test_tf32_is_the_nearest_of_its_neighbours(value):
    x = torch.tensor([value])
    down = truncate_tf32(x)
    bits = down.view(torch.int32)
    assert not bits & 0x1FFF
    assert down.abs() <= x.abs()
    up = (bits + 0x2000).view(torch.float32)
    if up.isfinite():
        wanted = (
            up if (x.double() - down.double()).abs() * 2 >= (up.double() - down).abs() else down
        )
        assert torch.equal(round_tf32(x), wanted)


def test_known_values():
    half = 2.0**-11
    x = torch.tensor([1 + half, 1 + 3 * half, -1 - half, 1 + half * 0.99, 65520.0, 1e-40, 0.0])
    # Ties go to even in fp16 and bf16, away from zero in tf32.
    fp16 = PRECISIONS["fp16"].round(x).tolist()
    assert fp16[:5] == [1.0, 1 + 4 * half, -1.0, 1.0, math.inf]
    assert fp16[5:] == [0.0, 0.0]
    tf32 = round_tf32(x).tolist()
    assert tf32[:5] == [1 + 2 * half, 1 + 4 * half, -1 - 2 * half, 1.0, 65536.0]
    assert truncate_tf32(x).tolist()[:5] == [1.0, 1 + 2 * half, -1.0, 1.0, 65504.0]


@pytest.mark.parametrize("name", PRECISIONS)
def test_not_finite_stays_not_finite(name):
    x = torch.tensor([math.inf, -math.inf, math.nan])
    # A NaN with payload in the low bits only must not become infinite.
    x[2:].view(torch.int32).fill_(0x7F800001)
    rounded = PRECISIONS[name].round(x).tolist()
    assert rounded[:2] == [math.inf, -math.inf]
    assert math.isnan(rounded[2])


def test_fp16_overflow_gives_inf_and_then_nan():
    large = torch.tensor([[300.0]])
    square = matmul(large, large, "fp16")
    assert square.item() == 90000.0  # the accumulator is float32
    assert matmul(square, torch.ones(1, 1), "fp16").item() == math.inf
    assert math.isnan(matmul(square, torch.zeros(1, 1), "fp16").item())
    assert matmul(square, torch.ones(1, 1), "bf16").isfinite()


@pytest.mark.parametrize("name", PRECISIONS)
def test_product_error_is_what_it_says(name):
    p = PRECISIONS[name]
    a, b = operands(4000), operands(4000).flip(0)
    if p.dtype == torch.float64:
        a, b = a.double() / 3, b.double() / 7
    exact = a.double() * b.double()
    error = (product(a, b, name).double() - exact).abs()
    # x3 adds up in the accumulator, and fp16 has fewer digits below 2^-14.
    accumulator = 3 * torch.finfo(p.dtype).eps / 2
    slack = p.tiny * (1 + p.unit) * (a.double().abs() + b.double().abs())
    assert (error <= (p.product_error + accumulator) * exact.abs() + slack).all()
    if p.round.__name__ != "_unchanged":
        assert error.max() > 0


@pytest.mark.parametrize("name", PRECISIONS)
def test_matmul_rounds_operands_and_accumulates_in_float32(name):
    p = PRECISIONS[name]
    a, b = operands(8, 32), operands(32, 8)
    found = matmul(a, b, name)
    assert found.dtype == p.dtype
    if not p.x3:
        rounded = p.round(a.to(p.dtype)) @ p.round(b.to(p.dtype))
        assert torch.equal(found, rounded)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    allowed = p.product_error + 34 * torch.finfo(p.dtype).eps / 2
    assert ((found - exact).abs() <= allowed * size + 32 * p.tiny * 1e4).all()


@pytest.mark.parametrize(("split", "plain"), [("bf16x3", "bf16"), ("tf32x3", "tf32")])
def test_split_operands_square_the_error(split, plain):
    a, b = operands(64, 64), operands(64, 64).T
    exact = a.double() @ b.double()

    def error(name):
        return (torch.linalg.norm(matmul(a, b, name) - exact) / torch.linalg.norm(exact)).item()

    assert error(split) < 50 * max(error(plain) ** 2, 2.0**-24)
