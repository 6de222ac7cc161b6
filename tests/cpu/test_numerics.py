"""What docs/numerics.md claims beyond the methods' errors: bounds of entries, rounding once, E."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch

from sglang_trinv import ops
from sglang_trinv.reference import algorithms
from sglang_trinv.reference.chunk import chunk_A, chunk_local_cumsum, inverse, naive_fwd_intra
from sglang_trinv.reference.inputs import HARD_INPUTS, OUTSIDE_BOUND
from sglang_trinv.reference.layout import ChunkLayout
from sglang_trinv.reference.methods import invert
from sglang_trinv.reference.precision import PRECISIONS
from tests.tolerance import rel_err, stock_emulated

SAME = 1e-12
REFLECTING = ("equal keys, beta 1.9", "equal keys, beta 2", "random, beta 1.9",
              "cosine 0.5, beta 2", "alternating keys, beta 2")  # fmt: skip
WITHIN_2 = HARD_INPUTS | {name: OUTSIDE_BOUND[name] for name in REFLECTING}


def problem(name: str, n: int = 64, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """A of 4 heads and theorem 2's bound of the entries of X: [1, 4, n, n] float64 each."""
    x = WITHIN_2[name].build(n, Hg=4, K=32, V=1, dtype=torch.float64, **options)
    # Keys drawn in float32 may be longer than 1 by a rounding; then beta |k|^2 exceeds 2.
    k = x.k / torch.linalg.vector_norm(x.k, dim=-1, keepdim=True).clamp(min=1)
    layout = ChunkLayout.of(1, n, None, n, k.device)
    g = chunk_local_cumsum(x.g, chunk_size=n)
    A = chunk_A(layout, k, g, x.beta)
    length, g = torch.linalg.vector_norm(layout.split(k), dim=-1), layout.split(g)
    decay = (g[..., :, None] - g[..., None, :]).exp()
    bound = layout.split(x.beta)[..., None] * decay * length[..., :, None] * length[..., None, :]
    return A, bound.tril(-1)


@pytest.mark.parametrize("n", [16, 64, 128])
@pytest.mark.parametrize("name", WITHIN_2)
def test_entries_of_the_inverse_are_bounded(name: str, n: int) -> None:
    A, bound = problem(name, n)
    X = inverse(A).tril(-1)
    assert (X.abs() <= bound + SAME).all()
    if name.startswith("equal keys, beta"):  # neighbours reach it
        assert X.abs().max() >= bound.max() * 0.99


def test_entries_are_not_bounded_beyond_beta_k_k_of_2() -> None:
    X = inverse(OUTSIDE_BOUND["equal keys of length 1.5"].matrix(64))
    assert X.abs().max() > 1e6


def largest(method: str, A: torch.Tensor) -> tuple[float, float]:
    """Largest entries of the operands and of the results of the method's products, in float64."""
    operands, results = [], []

    def watched(a, b, precision, matmul=algorithms.matmul):
        found = matmul(a, b, precision)
        operands.extend((a.abs().max().item(), b.abs().max().item()))
        results.append(found.abs().max().item())
        return found

    with mock.patch.object(algorithms, "matmul", watched):
        invert(A, method, "fp64")
    return max(operands), max(results)


@pytest.mark.parametrize("name", WITHIN_2)
def test_operands_of_block_methods_are_bounded(name: str) -> None:
    """At most max beta, or the 1 on the diagonal, so fp16 cannot overflow. A product that is yet to
    be added to its sum is the difference of two such numbers."""
    A, _ = problem(name)
    most = 2.0 if name in REFLECTING else 1.0
    for method in ("MBH", "MBH16", "FS8", "FS16"):
        operand, result = largest(method, A)
        assert operand <= most + SAME, method
        assert result <= 2 * most + SAME, method


def test_operands_of_powers_are_not_bounded() -> None:
    A, _ = problem("equal keys, no decay")
    assert largest("MXR16", A)[0] > 1e3
    assert largest("MCH", A)[0] > 1e17


@pytest.mark.parametrize("n", [16, 32, 64])
@pytest.mark.parametrize("name", ["random", "cosine 0.98", "two clusters", "g -30 and -1e-4"])
def test_emulation_is_the_kernel(name: str, n: int) -> None:
    """MBH16 in fp16 does what the kernel does in Triton's interpreter, but for single roundings:
    the two differ by a hundredth of what either errs."""
    A = HARD_INPUTS[name].matrix(n, batch=4).float()
    kernel = ops.solve_tril(A.transpose(0, 1)[None].contiguous(), method="mbh_fp16")
    kernel, emulated = kernel[0].transpose(0, 1), invert(A, "MBH16", "fp16")
    error = rel_err(emulated, inverse(A.double()))
    assert error > 1e-5
    assert rel_err(kernel, emulated.double()) <= error / 20
    other = algorithms.bunch_hopcroft_blocks(A.tril(-1), PRECISIONS["fp16"], once=False)
    assert rel_err(other, emulated.double()) > error / 20  # the comparison would see it


def w_ratio(name: str, once: bool, seed: int) -> float:
    """Error of w in bfloat16 from the emulated kernel, in units of what is blameless."""
    x = HARD_INPUTS[name].build(64, Hg=8, V=16, seed=seed).summed()
    layout = ChunkLayout.of(1, 64, None, 64, x.k.device)
    A = chunk_A(layout, x.k, x.g, x.beta).float()
    X = algorithms.bunch_hopcroft_blocks(A, PRECISIONS["fp16"], once).bfloat16().float()
    k, beta, g = (layout.split(t).float() for t in (x.k, x.beta, x.g))
    kb = (k * (beta * g.exp())[..., None]).bfloat16().float()
    w = layout.join((X @ kb).bfloat16(), 1, 64)
    truth = naive_fwd_intra(x.k, x.v, x.g, x.beta)[0]
    stock = stock_emulated(x.k, x.v, x.g, x.beta)[0]
    return rel_err(w, truth) / max(rel_err(truth.bfloat16(), truth), rel_err(stock, truth))


def test_rounding_once_keeps_w() -> None:
    """Within 1.1 of what is blameless on every input; not so if each product rounds."""
    worst = {
        once: max(w_ratio(name, once, seed) for name in HARD_INPUTS for seed in (0, 1))
        for once in (True, False)
    }
    assert worst[True] <= 1.1
    assert worst[False] > 1.15


def test_E_form_keeps_tiny_entries() -> None:
    """Neighbours that couple by 2e-9 vanish in fp16 products, unless these only correct."""
    A = HARD_INPUTS["g -20"].matrix(64, batch=4)
    truth = inverse(A)
    there = (truth.tril(-1).abs() > 1e-30).nonzero(as_tuple=True)
    lost = {m: (invert(A, m, "fp16")[there] == 0).double().mean() for m in ("MBH", "MBH16")}
    assert lost["MBH16"] == 0
    assert lost["MBH"] > 0.5
    first = partial(torch.diagonal, offset=-1, dim1=-2, dim2=-1)
    assert rel_err(first(invert(A, "MBH16", "fp16")), first(truth)) <= 2.0**-11
