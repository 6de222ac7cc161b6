"""What the commands print, write and return, also when the user or a run is wrong."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sglang_trinv import cli
from sglang_trinv.evals import cli as evals_cli
from tests.evals.runs import finished_run


def invoke(*arguments):
    found = CliRunner().invoke(cli.app, list(arguments))
    assert "Traceback" not in found.output
    return found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--suite", "huge"), "--suite: want quick, tiny, real, got 'huge'"),
        (("--suite", "quick", "--model", "/nowhere"), "--model: want a model folder"),
        (("--tasks", "gdn_overwrit"), "knows no task 'gdn_overwrit'; similar are gdn_overwrite"),
        (("--model-args", "max_lenght=5"), "--model-args: want"),
        (("--arms", "off,oof"), "--arms: want"),
    ],
)
def test_what_the_user_gets_wrong_is_one_line_and_exit_4(tmp_path, arguments, said):
    found = invoke("eval", *arguments, "--out", str(tmp_path / "out"))
    assert found.exit_code == evals_cli.INVALID == 4
    assert said in found.output
    assert found.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arm", ["on", "full"])
def test_compare_judges_again_and_writes_a_report(tmp_path, arm):
    finished_run(tmp_path / "a", ("off", arm))
    found = invoke("compare", str(tmp_path / "a"))
    assert found.exit_code == 0, found.output
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert (report["verdict"], report["exit_code"]) == ("EQUIVALENT", 0)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "EQUIVALENT" in page
    assert f"0-off against 1-{arm}" in page
    assert page.count("data:image/png") == 2
    assert "http://" not in page


def test_compare_of_two_runs(tmp_path):
    finished_run(tmp_path / "a")
    finished_run(tmp_path / "b")
    a, b, out = (str(tmp_path / name) for name in "abc")
    assert invoke("compare", a, b, "--out", out).exit_code == 0
    found = invoke("compare", a, b)
    assert (found.exit_code, "--out: want" in found.output) == (4, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"tasks": ("gdn_niah",)}, "tasks"), ({"fingerprint": "g"}, "fingerprint")],
)
def test_runs_of_different_documents_are_not_compared(tmp_path, change, said):
    finished_run(tmp_path / "a")
    finished_run(tmp_path / "b", **change)
    found = invoke("compare", *(str(tmp_path / n) for n in "ab"), "--out", str(tmp_path / "c"))
    assert found.exit_code == 4
    assert f"error: {said}: " in found.output
    assert not (tmp_path / "c" / "report.json").exists()


def test_compare_of_no_run(tmp_path):
    found = invoke("compare", str(tmp_path))
    assert (found.exit_code, "has no plan.json" in found.output) == (4, True)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"fallbacks": 2}, "stock answered 2 calls"),
        ({"calls": 5}, "our kernels were called 5 times"),
        ({"calls": 0}, "our kernels were not called"),
    ],
)
def test_arms_that_did_not_run_what_they_say(tmp_path, record, said):
    finished_run(tmp_path, record=record)
    found = invoke("compare", str(tmp_path))
    assert (found.exit_code, said in found.output) == (4, True)


def test_a_blind_suite_is_invalid(tmp_path):
    """A wrong inverse that gets the same answers: the gate would see nothing."""
    finished_run(tmp_path, arms=("off", "on", "no_merges"))
    found = invoke("compare", str(tmp_path))
    assert found.exit_code == 4
    assert "unless the gate rejects it, but no_merges is EQUIVALENT" in found.output
    assert json.loads((tmp_path / "report.json").read_text())["comparisons"][0]["verdict"] == (
        "EQUIVALENT"
    )


def test_a_wrong_inverse_that_leaves_no_answer_is_seen(tmp_path):
    finished_run(tmp_path, arms=("off", "on", "no_merges"))
    bad = tmp_path / "arms" / "2-no_merges"
    record = json.loads((bad / "arm.json").read_text())
    (bad / "arm.json").write_text(json.dumps({**record, "failed": "lm-eval ended with status 1"}))
    (bad / "documents.jsonl").write_text("")
    (bad / "probe.npz").unlink()
    found = invoke("compare", str(tmp_path))
    assert found.exit_code == 0, found.output
    assert "INVALID" in found.output


@pytest.mark.parametrize("seen", [True, False])
def test_a_self_test_passes_if_wrong_inverses_are_seen(tmp_path, seen):
    finished_run(tmp_path, arms=("off", "bf16_rounding", "no_merges"))
    if seen:
        path = tmp_path / "arms" / "2-no_merges" / "documents.jsonl"
        path.write_text(path.read_text().replace('"correct": true', '"correct": false'))
    found = invoke("compare", str(tmp_path))
    assert found.exit_code == (0 if seen else 4)
    report = json.loads((tmp_path / "report.json").read_text())
    verdicts = {c["name"]: c["verdict"] for c in report["comparisons"]}
    assert verdicts["bf16_rounding"] == "EQUIVALENT"
    assert verdicts["no_merges"] == ("REGRESSION" if seen else "EQUIVALENT")
