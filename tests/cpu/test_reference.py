"""The float64 truth: its two forms agree, and the bound on the inverse holds where it should."""

from __future__ import annotations

import math

import pytest
import torch

from sglang_trinv.reference.bounds import condition_bound
from sglang_trinv.reference.chunk import (
    chunk_local_cumsum,
    naive_chunk_A,
    naive_chunk_forward,
    naive_fwd_intra,
    naive_kkt_solve,
    naive_solve_tril,
)
from sglang_trinv.reference.recurrence import l2norm, naive_gated_delta_rule, naive_kda
from tests.inputs import (
    GVA_RATIOS,
    HARD_INPUTS,
    LENGTHS,
    OUTSIDE_BOUND,
    REAL_GATES,
    real_gate_inputs,
)
from tests.tolerance import rel_err

# Rounding errors of float64 in the truth itself, with room for the longest sums here.
SAME = 1e-12


def forms(x, **options):
    """Outputs and final states of the token recurrence and of the chunk form."""
    args = (x.q, x.k, x.v, x.g, x.beta)
    options |= {"cu_seqlens": x.cu_seqlens}
    return zip(
        naive_gated_delta_rule(*args, **options),
        naive_chunk_forward(*args, **options),
        strict=True,
    )


@pytest.mark.parametrize("name", HARD_INPUTS)
def test_chunk_form_is_the_token_recurrence(name):
    x = HARD_INPUTS[name].build(130, Hg=1, H=2, K=32, V=16, dtype=torch.float32)
    for token, chunk in forms(x):
        assert rel_err(chunk, token) <= SAME


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_chunk_form_with_sequences_states_and_shared_heads(lengths):
    x = HARD_INPUTS["cosine 0.98"].build(sum(lengths), Hg=2, H=6, K=16, V=24, lengths=lengths)
    state = torch.randn(len(lengths), 6, 24, 16, generator=torch.Generator().manual_seed(1))
    for token, chunk in forms(x, initial_state=state, scale=0.5):
        assert rel_err(chunk, token) <= SAME


def test_batch_without_cu_seqlens_is_sequences_of_equal_length():
    lengths = [75] * 3
    x = HARD_INPUTS["random"].build(225, Hg=1, H=2, K=16, V=16, lengths=lengths)
    packed = (x.q, x.k, x.v, x.g, x.beta)
    batch = [t.view(3, 75, *t.shape[2:]) for t in packed]
    for function in (naive_gated_delta_rule, naive_chunk_forward):
        o, state = function(*packed, cu_seqlens=x.cu_seqlens)
        o_batch, state_batch = function(*batch)
        assert rel_err(o_batch.view_as(o), o) <= SAME
        assert rel_err(state_batch, state) <= SAME


@pytest.mark.parametrize("ratio", GVA_RATIOS)
def test_value_heads_share_key_heads_in_order(ratio):
    x = HARD_INPUTS["random"].build(70, Hg=2, H=2 * ratio, K=16, V=16)
    q, k = (t.repeat_interleave(ratio, dim=2) for t in (x.q, x.k))
    repeated, _ = naive_gated_delta_rule(q, k, x.v, x.g, x.beta)
    shared, _ = naive_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)
    assert torch.equal(shared, repeated)


def test_state_can_be_handed_from_127_tokens_to_1():
    x = HARD_INPUTS["cosine 0.98"].build(128, Hg=1, H=2, K=16, V=16)
    args = (x.q, x.k, x.v, x.g, x.beta)
    for function in (naive_gated_delta_rule, naive_chunk_forward):
        o, state = function(*args)
        head, between = function(*(t[:, :127] for t in args))
        tail, end = function(*(t[:, 127:] for t in args), initial_state=between)
        assert rel_err(torch.cat([head, tail], 1), o) <= SAME
        assert rel_err(end, state) <= SAME


def test_kda_with_equal_channels_is_the_gated_delta_rule():
    x = HARD_INPUTS["random"].build(70, Hg=2, H=4, K=16, V=8)
    gk = x.g[..., None].expand(-1, -1, -1, 16)
    expected = naive_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, use_qk_l2norm=True)
    for kda, gdn in zip(
        naive_kda(x.q, x.k, x.v, gk, x.beta, use_qk_l2norm=True), expected, strict=True
    ):
        assert rel_err(kda, gdn) <= SAME


def test_kda_decays_each_channel_by_itself():
    x = HARD_INPUTS["random"].build(2, K=4, V=3, dtype=torch.float32)
    gk = torch.log(torch.tensor([0.5, 1.0, 0.25, 1.0])).expand(1, 2, 1, 4)
    _, state = naive_kda(x.q, x.k, x.v, gk, x.beta)
    k, v, beta = (t[0, :, 0].double() for t in (x.k, x.v, x.beta))
    first = beta[0] * torch.outer(v[0], k[0])
    faded = first * gk[0, 1, 0].double().exp()
    wanted = faded + beta[1] * torch.outer(v[1] - faded @ k[1], k[1])
    assert rel_err(state[0, 0], wanted) <= SAME


def test_l2norm_divides_by_the_length():
    x = torch.randn(5, 128, dtype=torch.float64)
    assert rel_err(l2norm(x), x / x.square().sum(-1, keepdim=True).add(1e-6).sqrt()) <= SAME


def test_parts_of_the_chunk_form_fit_together():
    lengths = [64, 11, 0, 70]
    x = HARD_INPUTS["cosine 0.5"].build(145, Hg=2, H=4, K=32, V=16, lengths=lengths).summed()
    A = naive_chunk_A(x.k, x.g, x.beta, x.cu_seqlens)
    w, u, Ai = naive_fwd_intra(x.k, x.v, x.g, x.beta, x.cu_seqlens)
    assert [t.shape for t in (w, u, Ai)] == [(1, 145, 4, 32), (1, 145, 4, 16), (1, 145, 4, 64)]
    assert rel_err(naive_solve_tril(A, x.cu_seqlens), Ai) <= SAME
    assert rel_err(naive_kkt_solve(x.k, x.g, x.beta, x.cu_seqlens), Ai) <= SAME
    # The 11 rows of the second sequence by hand, without the chunk machinery.
    k, v, g, beta = (t[0, 64:75].double() for t in (x.k, x.v, x.g, x.beta))
    for h in range(4):
        decay = (g[:, None, h] - g[None, :, h]).exp()
        M = (beta[:, None, h] * decay * (k[:, h // 2] @ k[:, h // 2].T)).tril(-1)
        X = torch.linalg.inv(torch.eye(11, dtype=torch.float64) + M)
        assert rel_err(A[0, 64:75, h, :11], M) <= SAME
        assert rel_err(Ai[0, 64:75, h, :11], X) <= SAME
        assert rel_err(u[0, 64:75, h], X @ (beta[:, h, None] * v[:, h])) <= SAME
        kb = (beta[:, h] * g[:, h].exp())[:, None] * k[:, h // 2]
        assert rel_err(w[0, 64:75, h], X @ kb) <= SAME
    assert not Ai[0, 64:75, :, 11:].any()


def test_cumsum_starts_anew_in_every_chunk():
    g = torch.ones(1, 100, 1)
    cu_seqlens = torch.tensor([0, 30, 100])
    wanted = torch.cat([torch.arange(1, 31), torch.arange(1, 65), torch.arange(1, 7)])
    assert chunk_local_cumsum(g, cu_seqlens, 64)[0, :, 0].tolist() == wanted.tolist()


def test_without_gate_and_beta_means_no_decay_and_beta_1():
    x = HARD_INPUTS["random"].build(70, Hg=2, K=16, V=8)
    zero, one = torch.zeros_like(x.g), torch.ones_like(x.beta)
    for plain, full in zip(
        naive_fwd_intra(x.k, x.v), naive_fwd_intra(x.k, x.v, zero, one), strict=True
    ):
        assert torch.equal(plain, full)


def weighted_norms(x, n: int) -> torch.Tensor:
    """||(I + A)^-1 diag(beta)||_2 of every chunk and head."""
    x = x.summed(n)
    Ai = naive_kkt_solve(x.k, x.g, x.beta, x.cu_seqlens, n)[0]
    Ai = Ai.unflatten(0, (-1, n)).transpose(1, 2)
    beta = x.beta[0].double().unflatten(0, (-1, n)).transpose(1, 2)
    return torch.linalg.matrix_norm(Ai * beta[..., None, :], ord=2)


@pytest.mark.parametrize("n", [16, 64, 128])
@pytest.mark.parametrize("name", HARD_INPUTS)
def test_inverse_times_beta_is_at_most_2(name, n):
    x = HARD_INPUTS[name].build(2 * n, Hg=4, K=64, V=1, dtype=torch.float64)
    assert weighted_norms(x, n).max().item() <= condition_bound(1.0, 1.0) * (1 + SAME)
    # Rounded to bfloat16 some keys are longer than 1, and the bound is a little higher.
    x = HARD_INPUTS[name].build(2 * n, Hg=4, K=64, V=1, dtype=torch.bfloat16)
    longest = torch.linalg.vector_norm(x.k.double(), dim=-1).max().item()
    bound = condition_bound(x.beta.max().item(), longest)
    assert bound <= 2.05
    assert weighted_norms(x, n).max().item() <= bound * (1 + SAME)


def test_bound_of_2_is_nearly_reached_inside_and_broken_outside():
    inside = HARD_INPUTS["equal keys, no decay"].build(128, dtype=torch.float64)
    assert weighted_norms(inside, 128).max() > 1.99
    norms = {
        name: weighted_norms(case.build(64, dtype=torch.float64), 64).max().item()
        for name, case in OUTSIDE_BOUND.items()
    }
    assert sum(norm > 2 for norm in norms.values()) >= 5
    assert norms["equal keys, beta 2"] > 30
    assert norms["equal keys of length 1.5"] > 1e6
    assert condition_bound(2.0) == math.inf
    assert condition_bound(1.9) == pytest.approx(38)
    assert norms["equal keys, beta 1.9"] <= condition_bound(1.9)


@pytest.mark.parametrize("name", REAL_GATES)
def test_bound_holds_for_real_gates(name):
    x = real_gate_inputs(name, "equal keys, beta 1", K=32, V=1, dtype=torch.float64)
    assert weighted_norms(x, 64).max().item() <= 2 * (1 + SAME)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="B: want 1 with cu_seqlens, got 2"):
        naive_solve_tril(torch.zeros(2, 4, 1, 16), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="cu_seqlens: want 0 <= ascending <= 4"):
        naive_solve_tril(torch.zeros(1, 4, 1, 16), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="H: want a multiple of Hg = 2, got 3"):
        naive_chunk_A(torch.zeros(1, 4, 2, 8), beta=torch.zeros(1, 4, 3))
