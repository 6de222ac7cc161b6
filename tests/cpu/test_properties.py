"""Properties of every method and op, on inputs that hypothesis draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_trinv import ops
from sglang_trinv.reference.bounds import power_growth, rounding_bound
from sglang_trinv.reference.chunk import inverse, naive_fwd_intra
from sglang_trinv.reference.inputs import Case, cosine_keys, cu_seqlens_of
from sglang_trinv.reference.methods import METHODS, SIZES, invert
from sglang_trinv.reference.precision import precision_of
from sglang_trinv_cpu_platform import bfloat16
from tests.op_checks import run_fwd_intra
from tests.tolerance import rel_err, stock_emulated, tolerance

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy: exp2 above the diagonal
STABLE = [m.name for m in METHODS.values() if m.stable]
norm = torch.linalg.matrix_norm


@pytest.fixture(autouse=True, scope="module")
def interpreter_bfloat16() -> Iterator[None]:
    undo = bfloat16.install()
    yield
    undo()


def between(low: float, high: float):
    """Uniform [T, H] gates, for a Case."""
    return lambda gen, T, H: low + (high - low) * torch.rand(T, H, generator=gen)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, int]:
    """A kind of input inside the bound, and a seed."""
    beta = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    steepest = 10.0 ** draw(st.floats(-12, 2))
    case = Case(cosine_keys(draw(st.floats(0, 1))), between(*beta), between(-steepest, 0.0))
    return case, draw(st.integers(0, 2**31))


def drawn(examples: int, **strategies):
    """hypothesis with as many examples, the same ones in every run."""
    slow = [HealthCheck.too_slow]  # Triton's interpreter on a busy machine
    chosen = settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=slow
    )
    return lambda test: chosen(given(**strategies)(test))


@drawn(
    120,
    n=st.sampled_from(SIZES[:3]),
    name=st.sampled_from([m.name for m in METHODS.values() if m.exact(64)]),
    precision=st.sampled_from(["bf16", "tf32", "fp32", "fp64", "bf16x3", "tf32x3"]),
    case=cases(),
)
def test_I_plus_A_times_the_inverse_is_I(n, name, precision, case) -> None:
    """Of every exact method to the tolerance claimed for it: the rounding bound if stable, else one
    rounding times the growth of the powers besides."""
    A = case[0].matrix(n, batch=2, seed=case[1])
    L = torch.eye(n, dtype=torch.float64) + A
    X = invert(A, name, precision).double()
    allowed = rounding_bound(n, precision)
    if not METHODS[name].stable:
        allowed = allowed + precision_of(precision).product_error * power_growth(A)
        allowed = allowed + torch.finfo(precision_of(precision).dtype).eps * power_growth(A)
    size = norm(L, ord=2) * norm(inverse(A))
    assert (norm(L @ X - torch.eye(n)) <= allowed * size).all()


@drawn(40, n=st.sampled_from(SIZES), order=st.sampled_from([3, 7, 15, 31]), case=cases())
def test_truncated_series_leave_the_power_they_promise(n, order, case) -> None:
    """I - (I + A) X is A^(2^r) after r rounds of Newton-Schulz, A^(2 (m + 1)) for Neumann."""
    A = case[0].matrix(n, batch=2, seed=case[1]) / 8  # small: otherwise only rounding is seen
    L = torch.eye(n, dtype=torch.float64) + A
    left = torch.eye(n) - L @ invert(A, f"Neumann{order}", "fp64")
    assert (left - torch.linalg.matrix_power(A, 2 * (order + 1))).abs().max() < 1e-12
    rounds = order.bit_length() + 1
    left = torch.eye(n) - L @ invert(A, f"NS{rounds}", "fp64")
    assert (left - torch.linalg.matrix_power(A, 2**rounds)).abs().max() < 1e-12


@drawn(
    60,
    n=st.sampled_from(SIZES[:3]),
    name=st.sampled_from(STABLE),
    precision=st.sampled_from(["fp16", "bf16", "tf32", "fp32"]),
    cut=st.sampled_from([1, 5, 16, 31]),
    case=cases(),
)
def test_rows_depend_on_earlier_rows_alone(n, name, precision, cut, case) -> None:
    """The leading block of the inverse is the inverse of the leading block, bit for bit."""
    cut = min(cut, n - 1)
    A = case[0].matrix(n, batch=1, seed=case[1])
    X = invert(A, name, precision)
    other = A.clone()
    other[:, cut:] = 0.5
    assert torch.equal(invert(other, name, precision)[:, :cut], X[:, :cut])


@drawn(
    40,
    name=st.sampled_from(STABLE),
    precision=st.sampled_from(["fp16", "tf32", "fp32"]),
    case=cases(),
)
def test_blocks_that_do_not_touch_are_inverted_alone(name, precision, case) -> None:
    if name == "NS_scaled":  # starts from I / 2n, n of the whole
        return
    A = case[0].matrix(32, batch=2, seed=case[1])
    both = torch.block_diag(*A)[None]
    X = invert(both, name, precision)[0].double()
    alone = torch.block_diag(*invert(A, name, precision).double())
    assert not X[32:, :32].any()
    assert rel_err(X, alone) <= 2.0**-20  # sums of zeros aside, the same operations


@drawn(
    12,
    n=st.sampled_from([16, 32, 64]),
    method=st.sampled_from([m for m in ops.METHODS if m != "auto"]),
    case=cases(),
)
def test_solve_tril_inverts(n, method, case) -> None:
    A = case[0].matrix(n, batch=2, seed=case[1])
    X = ops.solve_tril(A.float().transpose(0, 1)[None].contiguous(), method=method)
    X = X[0].transpose(0, 1).double()
    L = torch.eye(n, dtype=torch.float64) + A.float()
    precision = "fp16" if ops.METHODS[method] == "fp16" else "tf32"
    size = norm(L, ord=2) * norm(inverse(A))
    assert (norm(L @ X - torch.eye(n)) <= rounding_bound(n, precision) * size).all()
    assert not X.triu(1).any()
    assert (X.diagonal(dim1=-2, dim2=-1) == 1).all()


lengths = st.lists(st.sampled_from([0, 1, 17, 64, 70]), min_size=1, max_size=2).filter(any)


@drawn(4, lengths=lengths, ratio=st.integers(1, 3), case=cases())
def test_fwd_intra_keeps_sequences_and_heads_apart(lengths, ratio, case) -> None:
    """Packed sequences and shared key heads give what each sequence and head gives alone."""
    x = case[0].build(
        sum(lengths), Hg=1, H=ratio, K=16, V=16, seed=case[1], lengths=lengths
    ).summed()  # fmt: skip
    packed = run_fwd_intra(x)
    start = 0
    for length in (n for n in lengths if n):
        rows = slice(start, start + length)
        start += length
        head = ratio - 1
        alone = replace(
            x, k=x.k[:, rows].contiguous(), v=x.v[:, rows, head:].contiguous(),
            g=x.g[:, rows, head:].contiguous(), beta=x.beta[:, rows, head:].contiguous(),
            cu_seqlens=cu_seqlens_of([length]),
        )  # fmt: skip
        for a, b in zip(packed, run_fwd_intra(alone), strict=True):
            assert torch.equal(a[:, rows, head:], b)


@drawn(4, lengths=lengths, ratio=st.integers(1, 3), case=cases())
def test_fwd_intra_is_as_accurate_as_stock(lengths, ratio, case) -> None:
    x = case[0].build(
        sum(lengths), Hg=1, H=ratio, K=32, V=16, seed=case[1], lengths=lengths
    ).summed()  # fmt: skip
    truth = naive_fwd_intra(x.k, x.v, x.g, x.beta, x.cu_seqlens)
    stock = stock_emulated(x.k, x.v, x.g, x.beta, x.cu_seqlens)
    for ours, t, s in zip(run_fwd_intra(x), truth, stock, strict=True):
        # Twice, not 1.2 times: a few tokens are one draw of the rounding errors for either side.
        assert rel_err(ours, t) <= tolerance(t, s, ours.dtype, factor=2.0)
