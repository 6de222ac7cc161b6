"""Every method inverts as accurately, or as badly, and at the cost, that is claimed for it."""

from __future__ import annotations

import functools
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_trinv.reference import algorithms
from sglang_trinv.reference.bounds import power_growth, rounding_bound
from sglang_trinv.reference.methods import METHODS, SIZES, invert
from sglang_trinv.reference.precision import PRECISIONS, precision_of
from tests.inputs import OUTSIDE_BOUND, Case, cosine_keys, hard_matrices
from tests.tolerance import FACTOR, rel_err

STABLE = [m.name for m in METHODS.values() if m.stable]


def inverse(A: torch.Tensor) -> torch.Tensor:
    """(I + A)^-1 in float64, by LAPACK."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype).expand_as(A)
    return torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)


@functools.cache
def matrices(n: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Names, A and (I + A)^-1 of all hard inputs, two matrices each: [names, 2, n, n]."""
    hard = hard_matrices(n, batch=2)
    A = torch.stack(list(hard.values()))
    return list(hard), A, inverse(A)


def errors(method: str, precision: str, n: int) -> dict[str, float]:
    """Relative error on each hard input, the worse of two matrices; inf where not finite."""
    names, A, truth = matrices(n)
    X = invert(A, method, precision).double()
    error = torch.linalg.matrix_norm(X - truth) / torch.linalg.matrix_norm(truth)
    worst = error.nan_to_num(nan=math.inf).amax(1)
    return dict(zip(names, worst.tolist(), strict=True))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", METHODS)
def test_exact_methods_are_exact(name, n):
    """Within one rounding error of the inverse, or of the powers of A for unstable methods."""
    method = METHODS[name]
    if not method.exact(n):
        worst = max(errors(name, "fp64", n).values())
        if not method.stable:  # truncated
            assert errors(name, "fp64", n)["equal keys, beta 1"] > 1
        elif n < 64:  # the scaled start converges slowly: more rounds for larger blocks
            assert worst > rounding_bound(n, "fp64")
        else:
            assert worst <= rounding_bound(n, "fp64")
        return
    _, A, _ = matrices(n)
    growth = power_growth(A).amax(1)
    for (case, error), lost in zip(errors(name, "fp64", n).items(), growth, strict=True):
        allowed = 1 if method.stable else lost.item()
        assert error <= rounding_bound(n, "fp64") * allowed, case


# Truncation errors all point the same way, and MCS truncates X again in each of its n products.
BOUNDED = [
    (m, p) for m in STABLE for p in PRECISIONS if (m, p) != ("MCS", "tf32rz") and p != "fp64"
]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("name", "precision"), BOUNDED)
def test_stable_methods_keep_to_the_bound(name, precision, n):
    for case, error in errors(name, precision, n).items():
        assert error <= rounding_bound(n, precision), case


WORST_AT_64 = {
    ("VCS", "fp32"): 2.8e-7,
    ("MCS", "fp32"): 2.8e-7,
    ("MBH", "fp16"): 1.1e-3,
    ("MBH", "tf32"): 1.1e-3,
    ("MBH", "bf16"): 9.3e-3,
    ("MBH", "bf16x3"): 1.7e-5,
    ("MBH", "tf32x3"): 4.5e-7,
    ("MXR4", "fp16"): 1.1e-3,
    ("MXR8", "fp16"): 5.4e-3,
    ("FS16", "tf32"): 1.0e-3,
    ("FS8", "fp16"): 1.1e-3,
    ("NS_scaled", "fp16"): 1.1e-3,
    ("MXR16", "fp16"): 8.5,
    ("MXR16", "bf16"): 3.7e3,
    ("MCH", "fp32"): 1.4e10,
    ("NS6", "fp32"): 4.0e9,
    ("Neumann31", "fp32"): 3.3e9,
}


@pytest.mark.parametrize(("method", "claimed"), WORST_AT_64.items())
def test_worst_error_at_64_is_as_published(method, claimed):
    """Within a factor of 2; where errors grow without bound, of 10: it depends on the sample."""
    factor = 2 if METHODS[method[0]].stable else 10
    assert claimed / factor <= max(errors(*method, 64).values()) <= claimed * factor


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
@pytest.mark.parametrize("name", ["MCH", "NS6", "Neumann31", "MXR16"])
def test_unstable_methods_break_on_equal_keys(name, precision):
    found = errors(name, precision, 64)
    # 1 is an error as large as the inverse itself; MXR16 does not reach it on all near-equal keys.
    assert found["equal keys, beta 1"] > 1
    assert found["cosine 0.98"] > 100 * rounding_bound(64, precision)
    # On random keys nothing is wrong with them: tests on random keys alone find nothing.
    assert found["random"] <= rounding_bound(64, precision)


@pytest.mark.parametrize("rounds", [3, 4, 5])
def test_too_few_newton_schulz_rounds_are_wrong_even_in_fp64(rounds):
    assert errors(f"NS{rounds}", "fp64", 64)["equal keys, beta 1"] > 1e6


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32", "fp64"])
@pytest.mark.parametrize("n", [16, 32, 64])
@pytest.mark.parametrize("name", ["MCH", "NS"])
def test_errors_of_powers_follow_their_growth(name, n, precision):
    """Error <= growth times one rounding, and for equal keys at least a hundredth of that."""
    name = f"NS{int(math.log2(n))}" if name == "NS" else name
    _, A, _ = matrices(n)
    unit = precision_of(precision).unit
    found = errors(name, precision, n)
    for (case, error), growth in zip(found.items(), power_growth(A).amax(1).tolist(), strict=True):
        assert error <= unit * growth + rounding_bound(n, precision), case
        if case == "equal keys, beta 1":
            assert error >= unit * growth / 100


@pytest.mark.parametrize("n", SIZES)
def test_blocks_of_4_are_safe_and_16_are_not(n):
    def worst(block, precision):
        return max(errors(f"MXR{block}", precision, n).values())

    for precision in ("fp16", "bf16"):
        assert worst(4, precision) <= rounding_bound(n, precision)
        assert worst(8, precision) > 2 * worst(4, precision)
        assert worst(16, precision) > 0.1 > worst(8, precision)


@pytest.mark.parametrize("case", OUTSIDE_BOUND)
def test_split_operands_serve_inputs_outside_the_bound(case):
    """MBH with x3 operands is at least as good as SGLang's tf32 merges, or as bfloat16 is."""
    A = OUTSIDE_BOUND[case].matrix(64)
    truth = inverse(A)
    stock = rel_err(invert(A, "FS16", "tf32"), truth)
    allowed = FACTOR * max(stock, rel_err(truth.bfloat16(), truth))
    for precision in ("bf16x3", "tf32x3"):
        assert rel_err(invert(A, "MBH", precision), truth) <= allowed


def test_fp16_operands_do_not_serve_inputs_outside_the_bound():
    A = OUTSIDE_BOUND["equal keys of length 1.5"].matrix(64)
    truth = inverse(A)
    stock = rel_err(invert(A, "FS16", "tf32"), truth)
    assert rel_err(invert(A, "MBH", "fp16"), truth) > FACTOR * stock


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", METHODS)
def test_number_of_products_is_as_registered(name, n):
    counted = mock.Mock(wraps=algorithms.matmul)
    with mock.patch.object(algorithms, "matmul", counted):
        invert(torch.zeros(n, n), name, "fp32")
    assert counted.call_count == METHODS[name].matmuls(n)
    assert METHODS[name].description


@pytest.mark.parametrize("name", METHODS)
def test_reads_and_writes_only_the_lower_triangle(name):
    A = hard_matrices(32, batch=2)["random"]
    X = invert(A, name, "fp16")
    poisoned = A.masked_fill(torch.ones(32, 32).triu().bool(), math.nan)
    assert torch.equal(invert(poisoned, name, "fp16"), X)
    assert not X.triu(1).any()
    assert X.dtype == torch.float32


def between(low: float, high: float):
    """Uniform [T, H] gates, for a Case."""
    return lambda gen, T, H: low + (high - low) * torch.rand(T, H, generator=gen)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.sampled_from(SIZES[:3]),
    name=st.sampled_from([m for m in STABLE if METHODS[m].exact(64)]),
    precision=st.sampled_from(list(PRECISIONS)),
    cosine=st.floats(0, 1),
    beta=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    decay=st.floats(-12, 4),
    seed=st.integers(0, 2**31),
)
def test_inverse_times_I_plus_A_is_I(n, name, precision, cosine, beta, decay, seed):
    """Any keys, beta and decay inside the bound: the residual is the error times ||I + A||."""
    case = Case(cosine_keys(cosine), between(*sorted(beta)), between(-(10.0**decay), 0.0))
    A = case.matrix(n, batch=2, seed=seed)
    L = torch.eye(n, dtype=torch.float64) + A
    X = invert(A, name, precision).double()
    size = torch.linalg.matrix_norm(L, ord=2) * torch.linalg.matrix_norm(inverse(A))
    assert (
        torch.linalg.matrix_norm(L @ X - torch.eye(n)) <= rounding_bound(n, precision) * size
    ).all()


def test_bad_arguments_are_named():
    A = torch.zeros(64, 64)
    with pytest.raises(ValueError, match="method: want one of VCS, .* got 'LU'"):
        invert(A, "LU")
    with pytest.raises(ValueError, match="precision: want one of fp16, .* got 'fp8'"):
        invert(A, "MBH", "fp8")
    with pytest.raises(ValueError, match=r"A: want .* got \(64, 48\)"):
        invert(A[:, :48])
