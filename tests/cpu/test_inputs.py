"""The test inputs are as hostile as their names say, and the tolerance rejects what it must."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from sglang_trinv.reference.chunk import naive_fwd_intra
from tests.inputs import (
    GATES_VARIABLE,
    GVA_RATIOS,
    HARD_INPUTS,
    LENGTHS,
    OUTSIDE_BOUND,
    REAL_GATES,
    chunk_indices_of,
    cu_seqlens_of,
    hard_matrices,
    paper_matrix,
    poison,
    poisoned_allocations,
    real_gate_inputs,
    real_gates,
)
from tests.tolerance import rel_err, stock_emulated, tolerance, worst_chunk_err

ALL_CASES = HARD_INPUTS | OUTSIDE_BOUND


def cosines(name: str, T: int = 64) -> torch.Tensor:
    """k_i . k_j for i > j, per head."""
    k = ALL_CASES[name].build(T, Hg=8, V=1, dtype=torch.float64).k[0].transpose(0, 1)
    i, j = torch.tril_indices(T, T, -1)
    return (k @ k.mT)[:, i, j]


@pytest.mark.parametrize("name", ALL_CASES)
def test_shapes_types_and_lengths_of_keys(name):
    case = ALL_CASES[name]
    x = case.build(70, Hg=2, H=6, K=64, V=32, dtype=torch.float16)
    assert [t.shape for t in (x.q, x.k)] == [(1, 70, 2, 64)] * 2
    assert x.v.shape == (1, 70, 6, 32)
    assert x.g.shape == x.beta.shape == (1, 70, 6)
    assert {t.dtype for t in (x.q, x.k, x.v)} == {torch.float16}
    assert x.g.dtype == x.beta.dtype == torch.float32
    norms = torch.linalg.vector_norm(x.k.double(), dim=-1)
    # Rounded after they are normalised: half a unit of float16 in each entry.
    assert (norms / case.length - 1).abs().max() < 2.0**-11 * 2
    assert (x.g <= 0).all()
    assert case.bounded == (x.beta.max() <= 1 and case.length <= 1)
    assert all(t.isfinite().all() for t in (x.q, x.k, x.v, x.g, x.beta))


def test_same_seed_same_numbers_other_seed_other_numbers():
    case = HARD_INPUTS["cosine 0.5"]
    a, b, c = (case.build(32, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(a.k, b.k)
    assert torch.equal(a.beta, b.beta)
    assert not torch.equal(a.k, c.k)


def test_keys_are_related_as_their_names_say():
    assert cosines("equal keys, beta 1").sub(1).abs().max() < 1e-6
    assert cosines("equal keys of length 0.9").sub(0.81).abs().max() < 1e-6
    assert cosines("alternating keys").abs().sub(1).abs().max() < 1e-6
    assert cosines("alternating keys").min() < -0.99
    for cosine in (0.5, 0.98, 0.998):
        assert cosines(f"cosine {cosine}").mean().item() == pytest.approx(cosine, abs=0.01)
    assert cosines("random").mean().abs() < 0.02
    clusters = cosines("two clusters")
    assert (((clusters - 1).abs() < 1e-6).sum(1) >= 900).all()
    k = HARD_INPUTS["plane"].build(64, Hg=1, V=1, dtype=torch.float64).k[0, :, 0]
    assert torch.linalg.matrix_rank(k, tol=1e-5) == 2
    k = HARD_INPUTS["period 16"].build(64, Hg=1, V=1).k
    assert torch.equal(k[:, :48], k[:, 16:])


def test_gates_are_as_their_names_say():
    gates = {name: case.build(256, H=4) for name, case in ALL_CASES.items()}
    assert (gates["g -20"].g == -20).all()
    assert (gates["g -166"].g == -166).all()
    assert (gates["g 0"].g == 0).all()
    assert gates["g -30 and -1e-4"].g.unique().numel() == 2
    assert gates["random, beta near 0 and 1"].beta.unique().numel() == 2
    betas = {name: x.beta.unique() for name, x in gates.items()}
    for beta in (1, 0.9997, 0.835):
        assert betas[f"equal keys, beta {beta}"].tolist() == pytest.approx([beta])
    assert -1e-4 <= gates["equal keys, beta 1"].g.min() < gates["equal keys, beta 1"].g.max() <= 0


def test_matrices_are_strictly_lower_and_paper_is_uniform():
    for name, A in hard_matrices(64, batch=4).items():
        assert A.shape == (4, 64, 64), name
        assert A.dtype == torch.float64
        assert not A.triu().any()
    lower = paper_matrix(128)[:, *torch.tril_indices(128, 128, -1)]
    assert 0 <= lower.min() < 0.001 < 0.499 < lower.max() < 0.5
    assert lower.mean().item() == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_sequences(lengths):
    x = HARD_INPUTS["random"].build(sum(lengths), K=16, V=8, lengths=lengths)
    assert x.cu_seqlens.dtype == torch.int32
    assert x.cu_seqlens.diff().tolist() == lengths
    chunks = [(n, c) for n, T in enumerate(lengths) for c in range(math.ceil(T / 64))]
    assert chunk_indices_of(x.cu_seqlens).tolist() == [list(pair) for pair in chunks]
    summed = x.summed()
    assert summed.g.dtype == torch.float32
    starts = [x.cu_seqlens[n] + 64 * c for n, c in chunks]
    assert torch.equal(summed.g[:, starts], x.g[:, starts])


def test_lengths_must_add_up():
    with pytest.raises(ValueError, match="lengths: want the sum 64, got 63"):
        HARD_INPUTS["random"].build(64, lengths=[63])


def test_poisoned_memory_is_nan_inside_and_normal_after():
    originals = (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)
    x = torch.zeros(3)
    with poisoned_allocations():
        made = (
            torch.empty(3),
            torch.empty_like(x),
            torch.empty_strided((3,), (1,)),
            x.new_empty(3, dtype=torch.bfloat16),
        )
        assert all(t.isnan().all() for t in made)
        assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
        assert not torch.zeros(3).any()
    after = (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)
    assert after == originals
    assert poison(x) is x
    assert x.isnan().all()


def test_real_gates_need_their_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(GATES_VARIABLE, raising=False)
    with pytest.raises(pytest.skip.Exception, match=f"{GATES_VARIABLE} is not set"):
        real_gates("Qwen3-Next")
    monkeypatch.setenv(GATES_VARIABLE, str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="no file .*Qwen3-Next.npz"):
        real_gates("Qwen3-Next")


@pytest.mark.parametrize("name", REAL_GATES)
def test_real_gates(name):
    x = real_gate_inputs(name, H=4, Hg=2, K=16, V=8)
    assert x.g.shape == x.beta.shape == (1, 8192, 4)
    assert x.k.shape == (1, 8192, 2, 16)
    assert x.cu_seqlens[-1] == 8192
    assert x.g.max() <= 0
    assert 0 < x.beta.min() < x.beta.max() <= 1


def test_rel_err():
    ref = torch.tensor([3.0, 4.0])
    assert rel_err(ref, ref) == 0
    assert rel_err(torch.tensor([3.0, 5.0]), ref) == pytest.approx(0.2)
    assert rel_err(torch.zeros(2), torch.zeros(2)) == 0
    assert rel_err(ref, torch.zeros(2)) == math.inf
    assert rel_err(ref.double() * 1.5e200, ref.double() * 1e200) == pytest.approx(0.5)
    assert rel_err(torch.empty(0), torch.empty(0)) == 0
    for bad in (math.nan, math.inf):
        assert not rel_err(torch.tensor([3.0, bad]), ref) <= 1e300
    assert not rel_err(torch.tensor([math.nan]), torch.zeros(1)) <= 1e300
    with pytest.raises(ValueError, match=r"x: want the shape \(2,\), got \(1,\)"):
        rel_err(torch.zeros(1), ref)


def test_worst_chunk_finds_one_bad_row_in_a_long_prefill():
    lengths = [1, 5000, 0, 3000]
    cu_seqlens = cu_seqlens_of(lengths)
    ref = torch.randn(1, 8001, 8, 16, dtype=torch.float64)
    rounded, damaged = ref.bfloat16(), ref.bfloat16()
    damaged[0, 7000, 5] = 0
    assert rel_err(damaged, ref) < 0.01
    assert worst_chunk_err(damaged, ref, cu_seqlens) > 0.05
    error = functools.partial(worst_chunk_err, cu_seqlens=cu_seqlens)
    allowed = tolerance(ref, rounded, torch.bfloat16, error=error)
    assert error(rounded, ref) <= allowed < 0.01
    damaged[0, 7000, 5] = math.nan
    assert not error(damaged, ref) <= allowed
    assert worst_chunk_err(ref[:, :0], ref[:, :0]) == 0
    assert worst_chunk_err(torch.zeros(1, 64, 1, 4), torch.zeros(1, 64, 1, 4)) == 0
    assert worst_chunk_err(torch.ones(1, 64, 1, 4), torch.zeros(1, 64, 1, 4)) == math.inf


@pytest.mark.parametrize("ratio", GVA_RATIOS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_emulated_stock_is_near_the_truth(dtype, ratio):
    """Within a few units of the dtype: rounding A, v and u each cost one."""
    lengths = LENGTHS["ragged"]
    unit = torch.finfo(dtype).eps / 2
    for name in ("random", "cosine 0.5", "g -30 and -1e-4"):
        build = HARD_INPUTS[name].build
        x = build(sum(lengths), 2, 2 * ratio, K=32, V=16, dtype=dtype, lengths=lengths).summed()
        args = (x.k, x.v, x.g, x.beta, x.cu_seqlens)
        for stock, ref in zip(stock_emulated(*args), naive_fwd_intra(*args), strict=True):
            assert stock.dtype == dtype
            assert 0 < rel_err(stock, ref) < 4 * unit


def test_tolerance_passes_the_rounded_truth_and_rejects_damage():
    x = HARD_INPUTS["cosine 0.98"].build(128, Hg=1, H=2, K=64, V=64).summed()
    args = (x.k, x.v, x.g, x.beta)
    for stock, ref in zip(stock_emulated(*args), naive_fwd_intra(*args), strict=True):
        allowed = tolerance(ref, stock, stock.dtype)
        assert rel_err(ref.to(stock.dtype), ref) <= allowed
        assert rel_err(stock, ref) <= allowed
        for row in (0, 63, 127):
            damaged = stock.clone()
            damaged[:, row, 0] = 0
            assert rel_err(damaged, ref) > allowed
        damaged = stock.clone()
        damaged[0, 127, 1, 0] = math.nan
        assert not rel_err(damaged, ref) <= allowed


def test_tolerance_is_never_below_float32():
    eye = torch.eye(16, dtype=torch.float64)
    allowed = tolerance(eye, eye.bfloat16(), torch.bfloat16)
    assert rel_err(eye + 2e-9, eye) <= allowed < 1e-7


def test_stock_or_truth_that_is_not_finite_passes_nothing():
    ref = torch.ones(4, dtype=torch.float64)
    for value in (math.nan, math.inf):
        bad = torch.tensor([1.0, 1.0, 1.0, value], dtype=torch.float64)
        assert not rel_err(ref, ref) <= tolerance(ref, bad, torch.bfloat16)
        assert not rel_err(ref, ref) <= tolerance(bad, ref, torch.bfloat16)
    assert not rel_err(ref, ref) <= tolerance(ref * 1e5, ref * 1e5, torch.float16)


def test_emulated_stock_handles_sequences_apart():
    lengths = [40, 0, 70]
    x = HARD_INPUTS["cosine 0.5"].build(110, Hg=1, H=2, K=16, V=16, lengths=lengths).summed()
    packed = stock_emulated(x.k, x.v, x.g, x.beta, x.cu_seqlens)
    parts = []
    for bos, eos in ((0, 40), (40, 110)):
        parts.append(stock_emulated(*(t[:, bos:eos] for t in (x.k, x.v, x.g, x.beta))))
    for whole, *apart in zip(packed, *parts, strict=True):
        assert torch.equal(whole, torch.cat(apart, 1))


def test_cu_seqlens_of():
    assert cu_seqlens_of([3, 0, 2]).tolist() == [0, 3, 3, 5]
