"""The tasks' documents: right answers, the promised places, seeds that do not meet."""

from __future__ import annotations

import random
import re

import pytest

from sglang_trinv.evals.tasks import generators as gen
from sglang_trinv.evals.tasks import sources
from sglang_trinv.evals.training import check, data

documents = pytest.importorskip("sglang_trinv.evals.tasks.documents")


def last_value(context: str) -> str:
    """What the last write says about the asked key; knows nothing of the generator."""
    body, _, asked = context.rpartition("|")
    return re.findall(re.escape(asked) + r"(\d)", body)[-1]


@pytest.mark.parametrize("kind", ["one", "two", "four"])
def test_the_last_write_wins(kind: str) -> None:
    r = random.Random(kind)
    for _ in range(200):
        context, answer = gen.overwrite(r, kind, r.randint(2, 20), r.randint(20, 200))
        assert last_value(context) == answer


def test_a_stale_value_is_never_right() -> None:
    r = random.Random(0)
    for _ in range(200):
        context, answer = gen.overwrite(r, "one", 4, 40)
        body, _, asked = context.rpartition("|")
        values = re.findall(f"{asked}(\\d)", body)
        assert len(values) == 1 or values[-2] != answer


@pytest.mark.parametrize("kind", ["one", "two"])
def test_mqar_writes_each_key_once(kind: str) -> None:
    context, answer = gen.mqar(random.Random(1), kind, 20)
    pairs = re.findall(r"([a-z]+)(\d)", context)
    assert len(pairs) == len(dict(pairs)) == 20
    assert dict(pairs)[context.rpartition("|")[2]] == answer


def test_correlated_keys_share_three_bytes() -> None:
    keys = gen.keys(random.Random(2), "four", 14)
    assert len(set(keys)) == 14
    assert all(sum(a == b for a, b in zip(x, keys[0], strict=True)) >= 3 for x in keys)


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129, 257])
def test_boundary_puts_the_last_write_where_it_says(length: int) -> None:
    for row in range(64):
        if row > length - 3 or (row == 0 and length < 67):
            continue  # no room for the question behind it, or for the key before it
        context, answer = gen.boundary(random.Random(row), row, length)
        asked = context[-1]
        at = context.rfind(asked + answer, 0, length - 2) + 1
        assert len(context) == length
        assert at % 64 == row
        assert asked not in context[at + 1 : -2]
        assert last_value(context) == answer


def test_boundary_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="row 62 does not fit into 64 tokens"):
        gen.boundary(random.Random(0), 62, 64)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_niah_hides_the_pair_at_its_depth(depth: float) -> None:
    context, answer = gen.niah(random.Random(3), 4, 1000, depth)
    assert len(context) == 1000
    assert last_value(context) == answer
    assert abs(context.find(context[-1] + answer) / 1000 - depth) < 0.02


def test_dense_documents_answer_themselves() -> None:
    script = gen.dense(random.Random(4), "two", 6, 300)
    text = script.text
    assert 280 <= len(text) <= 300
    stored: dict[str, str] = {}
    for part in re.findall(r"[|;]|[a-z]{2}\d", ";" + text):
        if part in "|;":
            asking = part == "|"
        elif asking:
            assert stored[part[:2]] == part[2]
        else:
            stored[part[:2]] = part[2]
    assert len(script.answers) > 5


TASKS = {
    "overwrite": {"keys": "one", "n_keys": 5, "writes": 28},
    "mqar": {"keys": "two", "n_keys": 20},
    "correlated": {"n_keys": 5, "writes": 24},
    "boundary": {"lengths": [100, 129], "rows": [0, 63]},
    "niah": {"n_keys": 4, "length": 256},
}


@pytest.mark.parametrize("name", TASKS)
def test_data_sets_are_seeded(name: str) -> None:
    make = getattr(documents, name)
    one, two = (make(levels=[{**TASKS[name], "n": 40}])["test"].to_list() for _ in range(2))
    assert one == two
    assert len({row["context"] for row in one}) > 35
    assert [row["id"] for row in one] == list(range(40))
    assert all(last_value(row["context"]) == row["answer"] for row in one)


def test_no_document_was_trained_on_or_checked() -> None:
    mine = documents.overwrite(levels=[{"keys": "two", "n_keys": 24, "writes": 80, "n": 120}])
    mine = {row["context"] for row in mine["test"]}
    checked = {context for context, _ in check.documents("overwrite two 24x80", 256)}
    assert mine.isdisjoint(checked)
    assert documents.SEED not in ("train", "check")
    x, _ = data.batch(seed=20, index=0, done=0.5, tokens=4096)
    trained = bytes(b for b in x.reshape(-1).tolist() if b < 256).decode(errors="replace")
    assert not any(context in trained for context in mine)


def test_held_out_sources_are_not_trained_on() -> None:
    held, trained = set(sources.files(held_out=True)), set(sources.files(held_out=False))
    assert held.isdisjoint(trained)
    assert len(held) > 10
    rows = documents.rolling(levels=[{"text": "source", "length": 64, "spread": 128, "n": 128}])
    lengths = [len(row["text"]) for row in rows["test"]]
    assert {length % 64 for length in lengths} == set(range(64))


def test_the_suite_has_about_3000_documents() -> None:
    yaml = pytest.importorskip("yaml")
    from sglang_trinv.evals import tasks

    total = 0
    group = (tasks.PATH / "_gdn_regression.yaml").read_text()
    for name in re.search(r"task: \[(.*)\]", group).group(1).split(", "):
        text = (tasks.PATH / f"{name}.yaml").read_text().replace("!function ", "")
        config = yaml.safe_load(text)
        assert config["task"] == name
        make = getattr(documents, config["custom_dataset"].removeprefix("documents."))
        rows = make(**config["dataset_kwargs"])["test"]
        assert len(rows) == sum(level["n"] for level in config["dataset_kwargs"]["levels"])
        total += len(rows)
    assert 2700 <= total <= 3300
