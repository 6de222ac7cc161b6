"""The verdict on answers whose truth is known, and its error rates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sglang_trinv.evals import gate, statistics
from sglang_trinv.evals.gate import Margins, Verdict, judge
from tests.evals.conftest import documents, probe

N = 2500


def answers(rng, flips=0, lost_share=0.5, shift=0.0, spread=0.0, n=N, task="gdn_overwrite"):
    """(off, on): ``flips`` documents change, ``lost_share`` of them to wrong."""
    off = rng.random(n) < 0.85
    on = off.copy()
    lost = round(flips * lost_share)
    on[np.flatnonzero(off)[:lost]] = False
    on[np.flatnonzero(~off)[: flips - lost]] = True
    ll = -rng.exponential(size=n)
    change = shift + spread * rng.normal(size=n)
    return documents(off, ll, task), documents(on, ll + change, task)


def verdict(off, on, noise=0.001, **more):
    return judge(off, on, probe(), probe(noise), Margins(), **more)


def test_identical_answers_are_equivalent(rng):
    found = verdict(*answers(rng), noise=0.0)
    assert (found.verdict, found.reasons) == (Verdict.EQUIVALENT, [])
    assert found.accuracy["lost"] == found.accuracy["won"] == 0


def test_rounding_is_equivalent(rng):
    found = verdict(*answers(rng, flips=10, spread=0.05))
    assert found.verdict == Verdict.EQUIVALENT
    assert found.loglikelihood["n"] == N


def test_lost_answers_are_a_regression(rng):
    found = verdict(*answers(rng, flips=12, lost_share=1.0))
    assert found.verdict == Verdict.REGRESSION
    assert "12 answers lost, 0 won" in found.reasons[0]


def test_a_loss_in_one_task_is_found_among_many(rng):
    """9 lost, 0 won in one of six tasks, balanced flips elsewhere: pooled, it would drown."""
    off, on = answers(rng, flips=9, lost_share=1.0, n=400, task="bad")
    for i in range(5):
        a, b = answers(rng, flips=40, n=400, task=f"good {i}")
        off, on = off + a, on + b
    found = verdict(off, on)
    assert found.verdict == Verdict.REGRESSION
    assert [r for r in found.reasons if r.startswith("bad: 9 answers lost")]
    assert found.accuracy["p_worse"] > 0.05


def test_loglikelihood_sees_what_accuracy_does_not(rng):
    """The same right answers, each 0.03 nats less likely."""
    found = verdict(*answers(rng, shift=-0.03, spread=0.05))
    assert found.verdict == Verdict.REGRESSION
    assert found.accuracy["within"]


def test_more_likely_answers_are_not_equivalent_either(rng):
    found = verdict(*answers(rng, shift=0.03, spread=0.05))
    assert found.verdict == Verdict.INCONCLUSIVE


def test_too_few_documents_are_inconclusive_and_say_how_many(rng):
    found = verdict(*answers(rng, n=60))
    assert found.verdict == Verdict.INCONCLUSIVE
    assert "documents are needed, 60 were asked" in found.reasons[0]
    assert verdict(*answers(rng, n=60), bounds_accuracy=False).verdict == Verdict.EQUIVALENT


def test_divergence_alone_is_a_regression(rng):
    found = verdict(*answers(rng), noise=0.3)
    assert found.verdict == Verdict.REGRESSION
    assert "KL divergence" in " ".join(found.reasons)


def test_other_documents_are_invalid(rng):
    off, on = answers(rng, n=50)
    for changed, said in (
        (on[:-1], "1 documents are in one run alone"),
        ([replace(on[0], digest="another"), *on[1:]], "is another one in the other run"),
        ([replace(on[0], loglikelihood=float("nan")), *on[1:]], "log-likelihood nan"),
    ):
        found = verdict(off, changed)
        assert found.verdict == Verdict.INVALID
        assert said in found.reasons[0]


def test_a_baseline_below_its_floor_is_invalid(rng):
    found = verdict(*answers(rng), floors={"gdn_overwrite": 0.95})
    assert found.verdict == Verdict.INVALID
    assert "blind" in found.reasons[0]


def test_probes_of_other_documents_are_invalid(rng):
    found = judge(*answers(rng), probe(), probe(length=69), Margins())
    assert found.verdict == Verdict.INVALID


def test_a_regression_outweighs_an_inconclusive_bound(rng):
    found = gate.Judgement()
    found.say(Verdict.REGRESSION, "a")
    found.say(Verdict.INCONCLUSIVE, "b")
    assert found.verdict == Verdict.REGRESSION


@pytest.mark.parametrize(("lost", "won", "p"), [(0, 0, 1.0), (20, 9, 0.031), (5, 0, 1 / 32)])
def test_mcnemar(lost, won, p):
    """20 to 9 is what arXiv 2605.21325's code base shows for world history (docs/evals.md)."""
    assert statistics.Flips(400, 300, 300, lost, won).p_worse == pytest.approx(p, abs=0.001)


@pytest.mark.parametrize("n", [100, 400, 1319, 3000])
def test_no_flip_bounds_the_accuracy_by_the_rule_of_three(n):
    right = np.ones(n, bool)
    bound = statistics.accuracy_bound(right, right, 0.01, 0.05)
    assert bound.high == pytest.approx(1 - 0.05 ** (1 / n))
    assert bound.within == (n >= 299)


def test_error_rate_of_the_accuracy_bound():
    """A change as large as the margin passes at most as often as the level says."""
    for rate in (0.011, 0.03):
        rng, passed = np.random.default_rng(3), 0
        for _ in range(400):
            u, off = rng.random(2000), np.ones(2000, bool)
            off[u > 1 - (rate - 0.01) / 2] = False
            on = off.copy()
            on[u < (rate + 0.01) / 2] = False
            on[u > 1 - (rate - 0.01) / 2] = True
            passed += statistics.accuracy_bound(off, on, 0.01, 0.05).within
        assert passed <= 0.05 * 400 + 3 * np.sqrt(400 * 0.05 * 0.95)


def test_documents_needed_have_the_power_they_promise():
    n = statistics.documents_needed(0.02, 0.01, 0.05)
    assert 2000 < n < 2400  # docs/evals.md: 2165
    rng, passed = np.random.default_rng(4), 0
    for _ in range(300):
        u = rng.random(n)
        off, on = u > 0.01, ~((u > 0.01) & (u < 0.02))
        passed += statistics.accuracy_bound(off, on, 0.01, 0.05).within
    assert passed / 300 > 0.85


def test_bounds_without_variance():
    assert statistics.mean_bound(np.zeros(10), 0.01, 0.05).within
    assert not statistics.mean_bound(np.full(10, 0.02), 0.01, 0.05).within
    assert statistics.p_below(np.full(10, -0.02), -0.01) == 0.0
    assert statistics.p_below(np.zeros(10), -0.01) == 1.0
    assert statistics.bootstrap_mean(np.zeros(5), 0.05) == (0.0, 0.0)
