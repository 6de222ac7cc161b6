"""The folders of runs."""

from __future__ import annotations

import json
import os

import pytest

from sglang_trinv import runs
from sglang_trinv.runs import RunsError


def test_runs_are_newest_first_and_few(tmp_path):
    for i in range(runs.KEPT_RUNS + 5):
        (tmp_path / f"2026010{i // 10}-00000{i % 10}-1").mkdir()
    made = runs.new_run_dir(tmp_path)
    found = runs.runs(tmp_path)
    assert found[0] == made
    assert len(found) == runs.KEPT_RUNS
    assert runs.new_run_dir(tmp_path) != made


def test_latest_run_prefers_a_living_one(tmp_path):
    with pytest.raises(RunsError, match="no run in"):
        runs.latest_run(tmp_path)
    for name, pid in (("1", os.getpid()), ("2", 2**22 + 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text(json.dumps({"schema": 1, "pid": pid}))
    assert runs.latest_run(tmp_path).name == "1"
    (tmp_path / "1" / "x.json").unlink()
    assert runs.latest_run(tmp_path).name == "2"


def test_runs_root_follows_the_session(tmp_path):
    name = f"sglang-trinv-{os.getuid()}"
    assert runs.runs_root({"XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path / name
    assert runs.runs_root({"XDG_RUNTIME_DIR": "/nowhere"}).name == name


def test_a_run_with_a_living_process_is_kept(tmp_path):
    for i in range(runs.KEPT_RUNS):
        (tmp_path / f"2026010{i}-000000-1").mkdir()
    oldest = tmp_path / "20260100-000000-1"
    (oldest / "x.json").write_text(json.dumps({"schema": 1, "pid": os.getpid()}))
    runs.new_run_dir(tmp_path)
    assert oldest.is_dir()
    assert len(runs.runs(tmp_path)) == runs.KEPT_RUNS + 1


def test_a_root_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunsError, match="no folder for this run in .*file/x"):
        runs.new_run_dir(tmp_path / "file" / "x")
