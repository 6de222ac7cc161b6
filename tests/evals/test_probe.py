"""Distributions of two servers: divergence, greedy tokens, and what the answers are made of."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import rel_entr

from sglang_trinv.evals import probe as probes
from sglang_trinv.evals.errors import EvalError
from sglang_trinv.evals.probe import TOP
from tests.evals.conftest import probe


def test_divergence_is_that_of_the_whole_distributions():
    off, on = probe(), probe(0.05, seed=2)
    base = np.random.default_rng(1).normal(size=(30 * 70, 300)) * 3
    other = base + 0.05 * np.random.default_rng(2).normal(size=base.shape)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (base, other))
    full = rel_entr(p, q).sum(1)
    found = probes.divergence(off, on)
    assert found.mean() == pytest.approx(full.mean(), rel=0.2)
    assert (found <= full + 1e-9).all()
    assert probes.divergence(off, off).max() < 1e-12


def test_greedy_agreement():
    off, on = probe(), probe()
    on.greedy[0, 3:] += 1
    on.greedy[1, 0] += 1
    on.greedy[1, 1] = off.greedy[1, 1]
    same = probes.agreement(off, on)
    assert (same[0], same[1], same[2]) == (3, 0, 8)


def test_decided_changes():
    off, on = probe(), probe()
    lead = off.logprobs[:, 0] - off.logprobs[:, 1]
    clear, close = int(np.flatnonzero(lead >= 1)[0]), int(np.flatnonzero(lead < 1)[0])
    on.ids[[clear, close], 0] = 299
    assert probes.decided_changes(off, on) == (1, int((lead >= 1).sum()))


def meta(values, new):
    top = [[(v, 10 + i, None) for i in range(TOP)] for v in values]
    return {
        "input_token_logprobs": [(None, 1, None), *((v, 2, None) for v in values)],
        "input_top_logprobs": [None, *top],
        "output_token_logprobs": [(-0.1, 7, None)] * new,
        "output_top_logprobs": [[(-0.1, 7, None), (-2.0, 8, None)]] * new,
        "cached_tokens": 3,
    }


def test_answers_become_arrays():
    found = probes.collect([meta([-1.0, -2.0], 2), meta([-3.0], 1)], new_tokens=2)
    assert found.document.tolist() == [0, 0, 0, 1, 1]
    assert found.position.tolist() == [1, 2, 3, 1, 2]
    assert found.chosen.tolist() == pytest.approx([-1, -2, -0.1, -3, -0.1])
    assert found.greedy.tolist() == [[7, 7], [7, -1]]
    assert found.cached.tolist() == [3, 3]
    assert found.ids[2, :3].tolist() == [7, 8, -1]
    assert probes.divergence(found, found).max() < 1e-6


def test_an_answer_without_numbers_is_refused():
    with pytest.raises(EvalError, match="not a number"):
        probes.collect([meta([None], 1)], new_tokens=1)


def test_by_row_counts_from_the_chunk():
    off, on = probe(), probe()
    on.chosen[off.position == 65] += 0.5  # token 65 was predicted from row 0 of chunk 1
    rows = probes.by_row(off, on)
    assert rows[0] == pytest.approx(0.25)  # half of row 0 is position 1
    assert rows[1] == 0


def test_saved_probes_come_back(tmp_path):
    probe().save(tmp_path / "probe.npz")
    again = probes.Probe.load(tmp_path / "probe.npz")
    probes.check_same(again, probe())
    (tmp_path / "probe.npz").write_bytes(b"no")
    with pytest.raises(EvalError, match=r"probe.npz cannot be read"):
        probes.Probe.load(tmp_path / "probe.npz")


def test_a_probe_that_is_not_finite_is_refused():
    bad = probe()
    bad.logprobs[3, 0] = np.nan
    with pytest.raises(EvalError, match="not finite"):
        probes.check_same(probe(), bad)


def test_prefix_cache_asks_the_start_first():
    asked = []

    def ask(body):
        asked.append(body)
        return {"meta_info": meta([], 2)}

    probes.run(ask, ["abcdefgh"], new_tokens=2, prefix_cache=True, concurrency=1)
    assert [body["text"] for body in asked] == ["abcdef", "abcdefgh"]
    assert "logprob_start_len" not in asked[1]


def test_choose_is_even_and_short():
    texts = [f"{i:03}" for i in range(100)] + ["x" * 50]
    assert probes.choose(texts, 4, 10) == ["000", "025", "050", "075"]
    assert probes.choose(["a", "bb", "bb"], 4, 10) == ["bb"]
