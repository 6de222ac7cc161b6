"""The status of a process: counts under threads, files under bad folders, what a reader sees."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import setproctitle

from sglang_trinv import status
from sglang_trinv.status import ProcessStatus, read_run_dir, role_of


@pytest.fixture
def title(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def give(text: str) -> None:
        monkeypatch.setattr(setproctitle, "getproctitle", lambda: text)

    return give


def _only(folder: Path) -> dict:
    (content,) = read_run_dir(folder)
    return content


def _eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("text", "role"),
    [
        ("sglang::scheduler", "scheduler"),
        ("sglang::scheduler_TP0", "scheduler"),
        ("sglang::scheduler_DP1_TP3", "scheduler"),
        ("sglang::detokenizer", "detokenizer"),
        ("sglang::data_parallel_controller", "data_parallel_controller"),
        ("python -m sglang.launch_server --api-key secret", "main"),
        ("", "main"),
    ],
)
def test_role_comes_from_sglangs_title(text: str, role: str) -> None:
    assert role_of(text) == role


def test_file_has_every_field(tmp_path: Path) -> None:
    process = ProcessStatus(tmp_path)
    process.update(state="installed", release="0.5.20", layers={"gdn": 3, "kda": None})
    process.count_call("fwd_intra", "triton")
    content = json.loads((tmp_path / f"main-{os.getpid()}.json").read_text())
    assert list(content) == [
        "schema", "pid", "started", "role", "title", "version", "release", "method", "state",
        "reason", "layers", "device", "sm", "prefill_backend", "on_hot_path", "warmup_s",
        "self_check", "self_check_full", "rank", "world", "ranks", "mismatch", "hooks",
        "calls", "fallbacks", "check", "updated",
    ]  # fmt: skip
    assert content["state"] == "installed"
    assert content["calls"] == {"fwd_intra": {"triton": 1, "triton-interpreter": 0, "torch": 0}}
    assert content["check"]["wanted"] == content["check"]["disagreements"] == 0


def test_no_folder_no_file_no_thread() -> None:
    process = ProcessStatus()
    process.update(state="registered")
    process.count_call("fwd_intra", "triton")
    process.count_fallback("why")
    assert process._thread is None
    assert process.to_dict()["fallbacks"] == {"why": 1}


def test_unknown_field_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="no such status field"):
        ProcessStatus().update(stat="installed")


def test_role_change_moves_the_file(tmp_path: Path, title: Callable[[str], None]) -> None:
    title("python -c from multiprocessing.spawn import spawn_main --token secret")
    process = ProcessStatus(tmp_path)
    process.update(state="registered")
    assert _only(tmp_path)["role"] == "main"
    assert _only(tmp_path)["title"] == ""  # a command line may hold a secret
    title("sglang::scheduler_TP1")
    process.update(state="installed")
    content = _only(tmp_path)
    assert (content["role"], content["title"]) == ("scheduler", "sglang::scheduler_TP1")


def test_writes_at_powers_of_two_and_the_rest_within_a_second(tmp_path: Path) -> None:
    process = ProcessStatus(tmp_path)

    def written() -> int:
        return _only(tmp_path)["calls"]["fwd_intra"]["triton"]

    for expected in (1, 2, 2, 4, 4, 4, 4, 8):  # no thread yet: only what is written at once
        process.count_call("fwd_intra", "triton")
        assert written() == expected
    process.update(state="installed")  # starts the thread
    for _ in range(3):
        process.count_call("fwd_intra", "triton")
    assert _eventually(lambda: written() == 11)


def test_retitled_process_is_noticed_without_a_call(
    tmp_path: Path, title: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "WRITE_INTERVAL_S", 0.05)
    title("python")
    ProcessStatus(tmp_path).update(state="registered")
    title("sglang::detokenizer")
    assert _eventually(lambda: [s["role"] for s in read_run_dir(tmp_path)] == ["detokenizer"])


def test_counts_are_exact_under_threads(tmp_path: Path) -> None:
    process = ProcessStatus(tmp_path)

    def work() -> None:
        for _ in range(2000):
            process.count_call("fwd_intra", "triton")
            process.count_fallback("reason")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process.write()
    content = _only(tmp_path)
    assert content["calls"]["fwd_intra"]["triton"] == 8000
    assert content["fallbacks"] == {"reason": 8000}


def test_reasons_do_not_grow_without_bound() -> None:
    process = ProcessStatus()
    for i in range(500):
        process.count_fallback(f"shape {i}")
    assert len(process.fallbacks) <= status.MOST_REASONS + 1
    assert sum(process.fallbacks.values()) == 500
    assert process.fallbacks[status.OTHER_REASONS] > 400


def test_unwritable_folder_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    process = ProcessStatus(tmp_path / "file" / "run")  # root may write anywhere else
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            process.update(state="installed")
            process.count_call("fwd_intra", "triton")
    assert [r.message.split(":")[1].strip() for r in caplog.records] == ["status not written"]
    assert process.to_dict()["calls"]["fwd_intra"]["triton"] == 5


def test_removed_folder_is_not_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = ProcessStatus(tmp_path / "new" / "run")
    process.update(state="installed")
    shutil.rmtree(tmp_path / "new")
    process.write()
    assert not (tmp_path / "new").exists()
    assert not caplog.messages


def test_never_half_a_file(tmp_path: Path) -> None:
    process = ProcessStatus(tmp_path)
    process.update(state="installed")
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            process.write()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            for path in tmp_path.glob("*.json"):
                assert json.loads(path.read_text())["schema"] == 1
    finally:
        stop.set()
        writer.join()
    assert not list(tmp_path.glob(".*.tmp"))


CHILD = """
import sys
from pathlib import Path
from sglang_trinv import status
process = status.reset(Path(sys.argv[1]))
process.update(state="installed")
for _ in range(3):
    process.count_call("fwd_intra", "triton")
"""


def test_reader_marks_the_dead_and_skips_what_is_not_ours(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], check=True, timeout=60)
    ProcessStatus(tmp_path).update(state="registered")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"schema": 99}')
    (tmp_path / "list.json").write_text("[]")
    mine, child = read_run_dir(tmp_path)
    assert (mine["pid"], mine["alive"]) == (os.getpid(), True)
    assert (child["state"], child["alive"]) == ("installed", False)
    assert child["calls"]["fwd_intra"]["triton"] == 3  # the last ones are written at exit
    assert Path(child["file"]).parent == tmp_path


def test_a_reused_pid_is_not_the_same_process(tmp_path: Path) -> None:
    process = ProcessStatus(tmp_path)
    process.update(state="installed")
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "started": content["started"] - 3600}))
    assert _only(tmp_path)["alive"] is False


def test_missing_folder_reads_as_empty(tmp_path: Path) -> None:
    assert read_run_dir(tmp_path / "none") == []


def test_forked_child_starts_afresh(tmp_path: Path) -> None:
    process = status.reset(tmp_path)
    process.update(state="installed")
    process.count_call("fwd_intra", "triton")
    pid = os.fork()
    if pid == 0:
        ok = status.current() is not process and not status.current().calls["fwd_intra"]
        process.write()  # a stale reference must not write the parent's file
        os._exit(0 if ok and len(list(tmp_path.glob("*.json"))) == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    status.reset()
