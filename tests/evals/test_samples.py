"""lm-eval's log lines as records, for every kind of task."""

from __future__ import annotations

import json

import pytest

from sglang_trinv.evals import samples
from sglang_trinv.evals.errors import EvalError


def line(arguments, answers, target="x", doc_id=0, filter="none", **metrics):
    return {
        "doc_id": doc_id, "target": target, "filter": filter, "metrics": list(metrics),
        "arguments": {f"gen_args_{i}": a for i, a in enumerate(arguments)},
        "filtered_resps": answers, "doc_hash": "d", "prompt_hash": "p", "target_hash": "t",
        **metrics,
    }  # fmt: skip


def test_an_answer_of_one_token():
    found = samples.document(
        "t", line([{"arg_0": "a1|a", "arg_1": "1"}], [["-0.25", "True"]], acc=1), len
    )
    assert (found.correct, found.loglikelihood, found.tokens) == (True, -0.25, 1)
    assert (found.text, found.generated, found.per_token) == ("a1|a1", None, -0.25)


def test_multiple_choice_takes_the_right_one():
    choices = [{"arg_0": "q", "arg_1": f" {c}"} for c in "ABCD"]
    answers = [[f"-{i}.5", "False"] for i in range(4)]
    found = samples.document("t", line(choices, answers, target="2", acc=0.0), len)
    assert (found.correct, found.loglikelihood, found.tokens) == (False, -2.5, 2)


def test_rolling_counts_the_whole_text():
    found = samples.document("t", line([{"arg_0": "abcd"}], ["-8.0"], bits_per_byte=[-8.0, 4]), len)
    assert (found.correct, found.tokens, found.per_token) == (None, 4, -2.0)


def test_generation_has_text_and_no_loglikelihood():
    found = samples.document(
        "t", line([{"arg_0": "q", "arg_1": {"until": []}}], ["7"], exact_match=1.0), len
    )
    assert (found.correct, found.loglikelihood, found.generated) == (True, None, "7")
    assert found.text == "q"


def test_ruler_scores_by_length():
    sample = line([{"arg_0": "q", "arg_1": {}}], ["x"], **{"4096": -1, "16384": 1.0})
    assert samples.document("t", sample, len).correct is True


def test_one_filter_a_document(tmp_path):
    both = [
        line([{"arg_0": "q", "arg_1": {}}], ["x"], doc_id=i, filter=f, exact_match=float(i))
        for i in range(2)
        for f in ("strict-match", "flexible-extract")
    ]
    path = tmp_path / "model" / "samples_gsm8k_2026-01-01T00-00-00.000000.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, both)))
    found = samples.from_lm_eval(tmp_path, len)
    assert [(d.task, d.number, d.correct) for d in found] == [
        ("gsm8k", 0, False),
        ("gsm8k", 1, True),
    ]
    samples.save(tmp_path / "documents.jsonl", found)
    assert samples.load(tmp_path / "documents.jsonl") == found


def test_nothing_logged_is_an_error(tmp_path):
    with pytest.raises(EvalError, match="logged no sample"):
        samples.from_lm_eval(tmp_path, len)


def test_damaged_records_are_an_error(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"task": "t", "numb')
    with pytest.raises(EvalError, match=r"documents.jsonl cannot be read"):
        samples.load(path)
