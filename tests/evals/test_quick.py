"""The quick suite on real servers: lm-eval, probe, gate and report, ours against stock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_trinv.serve.config import detect_device
from tests.e2e.conftest import clean_environ

TIMEOUT_S = 1500  # for a machine that has other things to do
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(TIMEOUT_S + 60)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """A run of ``sglang-trinv eval --suite quick``: folder and process."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    argv = [sys.executable, "-m", "sglang_trinv", "eval", "--suite", "quick", "--arms", "off,on",
            "--out", str(folder)]  # fmt: skip
    done = subprocess.run(
        argv, env=clean_environ(tmp_path_factory.mktemp("caches")), capture_output=True, text=True,
        timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    return folder, done


@pytest.fixture(scope="module")
def report(finished: tuple[Path, subprocess.CompletedProcess]) -> dict:
    folder, done = finished
    assert (folder / "report.json").is_file(), done.stderr
    return json.loads((folder / "report.json").read_text())


def test_the_verdict_is_equivalent(finished, report):
    _, done = finished
    assert (report["verdict"], report["reasons"]) == ("EQUIVALENT", [])
    assert done.returncode == 0, done.stdout
    assert "EQUIVALENT" in done.stdout


def test_both_arms_ran_what_they_say(report):
    off, on = report["arms"]
    assert (off["kernels"], off["calls"]) == ("stock", 0)
    assert on["kernels"] == "ours"
    assert on["fallbacks"] == 0
    (main,) = report["comparisons"]
    prompts = sum(task["n"] for task in main["tasks"]) + main["probe"]["documents"]
    assert on["calls"] * on["concurrency"] >= 3 * prompts  # one a GDN layer and prefill batch


def test_the_servers_are_not_the_same_server(report):
    """Two kernels round differently; nothing at all would mean that one of them did not run."""
    (main,) = report["comparisons"]
    assert 0 < main["probe"]["kl"] < report["margins"]["kl"]
    assert main["loglikelihood"]["abs"] > 0


def test_the_model_knows_the_tasks(report):
    (main,) = report["comparisons"]
    right = {task["task"]: task["off"] for task in main["tasks"] if "off" in task}
    assert len(right) == 3
    assert min(right.values()) > 0.8


def test_documents_are_short(finished, report):
    folder, _ = finished
    rows = (folder / "arms" / "0-off" / "documents.jsonl").read_text().splitlines()
    assert 30 <= len(rows) <= 60
    assert max(len(json.loads(row)["text"]) for row in rows) <= 65


def test_the_same_command_again_runs_nothing(finished):
    folder, _ = finished
    before = (folder / "arms" / "1-on" / "arm.json").stat().st_mtime_ns
    argv = [sys.executable, "-m", "sglang_trinv", "eval", "--suite", "quick", "--arms", "off,on",
            "--out", str(folder)]  # fmt: skip
    done = subprocess.run(argv, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "2 of 2 arms are already done" in done.stderr
    assert (folder / "arms" / "1-on" / "arm.json").stat().st_mtime_ns == before


def test_it_ran_on_what_this_machine_has(report):
    assert report["plan"]["device"] == detect_device()
