"""Run folders: resuming, arms that fail, two runs at once, and how it is told."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from sglang_trinv.evals import arm as arm_module
from sglang_trinv.evals import harness, judge, plan, run, samples
from sglang_trinv.evals.errors import EvalError
from sglang_trinv.evals.plan import arms_of, opened, parse_arms, parse_model_args
from sglang_trinv.serve import tiny_model
from sglang_trinv.serve.config import ServeError
from tests.evals.runs import leave, make_plan


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def test_arms_differ_by_what_they_are_called():
    off, again, flashinfer, on, bad = arms_of(("off", "off", "flashinfer", "on", "no_merges"))
    method = {"SGLANG_TRINV_METHOD": "mbh_tf32"}
    assert (off.kernels, off.backend, off.repeat) == ("stock", "triton", 0)
    assert off.environ(method) == {}
    assert (again.name, again.repeat) == ("1-off", 1)
    assert (flashinfer.kernels, flashinfer.backend) == ("stock", "flashinfer")
    assert on.environ(method) == {"SGLANG_TRINV_STRICT": "1", **method}
    assert bad.environ({}) == {
        "SGLANG_TRINV_STRICT": "1", "SGLANG_TRINV_GDN": "intra", "SGLANG_TRINV_FAULT": "no_merges",
    }  # fmt: skip
    ours, studied, full = arms_of(("mbh_tf32x3", "MXR8-bf16", "full"))
    assert full.environ({})["SGLANG_TRINV_GDN"] == "full"
    assert (full.kernels, full.backend) == ("ours", "triton")
    expected = {"full": "same", "intra": "same", "mbh_tf32x3": "same", "bf16_rounding": "same",
                "mxr16": "", "MXR8-bf16": "", "no_merges": "worse"}  # fmt: skip
    assert {kind: judge.expected_of(kind) for kind in expected} == expected
    assert ours.environ({})["SGLANG_TRINV_METHOD"] == "mbh_tf32x3"
    assert "SGLANG_TRINV_FAULT" not in ours.environ({})
    assert studied.environ({})["SGLANG_TRINV_FAULT"] == "MXR8-bf16"
    configs = [arm_module.serve_config(make_plan(), arm, shared=False) for arm in (off, on)]
    one, two = (c.model_dump(exclude={"port"}) for c in configs)
    assert one | {"kernels": "ours"} == two
    assert "--disable-radix-cache" in one["extra"]
    assert one["extra"][:2] == ("--linear-attn-prefill-backend", "triton")
    cached = arm_module.serve_config(
        make_plan(prefix_cache=True, flags=("--x", "1")), on, shared=True
    )
    assert "--disable-radix-cache" not in cached.extra
    assert cached.extra[-2:] == ("--x", "1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("off,oof", "--arms: want off"),
        ("off,off", "a baseline"),
        ("on", "a baseline"),
        ("", "want"),
    ],
)
def test_bad_arms(text, said):
    with pytest.raises(EvalError, match=said):
        parse_arms(text)


def test_model_arguments_that_lm_eval_would_ignore():
    assert parse_model_args("num_concurrent=4,timeout=9") == {"num_concurrent": "4", "timeout": "9"}
    with pytest.raises(EvalError, match="--model-args: want max_gen_toks.*got 'max_lenght'"):
        parse_model_args("max_lenght=5")
    with pytest.raises(EvalError, match="want NAME=VALUE, got 'timeout'"):
        parse_model_args("timeout")


def test_lm_eval_is_asked_for_every_sample_and_no_cache():
    argv = harness.command(make_plan(limit=3, model_args={"timeout": "5"}), "http://h:1", "o", 7)
    given = argv[argv.index("--model_args") + 1].split(",")
    assert {"base_url=http://h:1/v1/completions", "num_concurrent=7", "timeout=5"} < set(given)
    assert "--log_samples" in argv
    assert "--use_cache" not in argv
    assert argv[argv.index("--limit") + 1] == "3"


def test_a_finished_arm_is_not_run_again(tmp_path, monkeypatch, console):
    ran = []
    monkeypatch.setattr(run, "run_arm", lambda p, a, f, *r: (ran.append(a.name), leave(p, a, f)))
    for _ in range(2):
        with opened(tmp_path, make_plan()):
            run.run_arms(make_plan(), tmp_path, 1, console)
    assert ran == ["0-off", "1-on"]


def test_an_interrupted_arm_starts_afresh(tmp_path, monkeypatch, console):
    """Only the arm that was cut off runs again, and nothing of its first server is left."""
    ran = []

    def once(plan, arm, folder, shared, stop, tell):
        ran.append(arm.name)
        shutil.rmtree(folder, ignore_errors=True)
        if ran.count("1-on") == 1 and arm.kind == "on":
            folder.mkdir(parents=True)
            (folder / "documents.jsonl").write_text("half")
            raise EvalError("cut off")
        leave(plan, arm, folder)

    monkeypatch.setattr(run, "run_arm", once)
    with opened(tmp_path, make_plan()), pytest.raises(EvalError, match="arm 1-on: cut off"):
        run.run_arms(make_plan(), tmp_path, 1, console)
    with opened(tmp_path, make_plan()):
        run.run_arms(make_plan(), tmp_path, 1, console)
    assert ran == ["0-off", "1-on", "1-on"]
    assert len(samples.load(tmp_path / "arms/1-on/documents.jsonl")) == 40


@pytest.mark.parametrize(
    "change",
    [{"fingerprint": "g"}, {"arms": ("on", "off")}, {"limit": 5}, {"flags": ("--x",)},
     {"tasks": ("gdn_niah",)}, {"sglang": "0.5.21"}, {"settings": {"SGLANG_TRINV_GDN": "intra"}}],
)  # fmt: skip
def test_another_run_does_not_go_on_in_this_folder(tmp_path, change):
    with opened(tmp_path, make_plan()):
        pass
    (name,) = change
    with (
        pytest.raises(EvalError, match=f"holds a run with {name}"),
        opened(tmp_path, make_plan(**change)),
    ):
        pass
    assert plan.read_plan(tmp_path) == make_plan()


def test_two_runs_in_one_folder(tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (
            pytest.raises(EvalError, match="another run is writing"),
            opened(tmp_path, make_plan()),
        ):
            pass
    assert not (tmp_path / "plan.json").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(EvalError, match="holds other files"), opened(tmp_path, make_plan()):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(EvalError, match="want 256 MiB free"), opened(tmp_path, make_plan()):
        pass


def test_the_disk_fills_up(tmp_path, monkeypatch, console):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "documents.jsonl")

    monkeypatch.setattr(run, "run_arm", full)
    with pytest.raises(EvalError, match="arm 0-off: No space left on device: documents.jsonl"):
        run.run_arms(make_plan(), tmp_path, 1, console)


def test_an_arm_fails_in_a_way_that_nobody_thought_of(tmp_path, monkeypatch, console):
    monkeypatch.setattr(run, "run_arm", lambda *_: {}["x"])
    with pytest.raises(EvalError, match="arm 0-off: KeyError: 'x'"):
        run.run_arms(make_plan(), tmp_path, 1, console)


def test_tokenizers_load_side_by_side():
    """In a fresh process: transformers' lazy imports are not safe in threads."""
    code = (
        "import sys; from concurrent.futures import ThreadPoolExecutor as P\n"
        "from sglang_trinv.evals.arm import token_counter\n"
        "print(*P(4).map(lambda _: token_counter(sys.argv[1])('abc'), range(4)))"
    )
    argv = [sys.executable, "-c", code, str(tiny_model.PATH)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == ["3"] * 4, done.stderr


def test_one_arm_fails_and_the_others_stop(tmp_path, monkeypatch, console):
    stopped = threading.Event()

    def arm(plan, arm, folder, shared, stop, tell):
        if arm.kind == "on":
            raise ServeError("sglang::scheduler (process 7) died\nwhy")
        assert stop.wait(20)
        stopped.set()
        raise run.Stopped

    monkeypatch.setattr(run, "run_arm", arm)
    with pytest.raises(EvalError, match="arm 1-on: sglang::scheduler"):
        run.run_arms(make_plan(), tmp_path, 2, console)
    assert stopped.is_set()


def test_the_server_dies_while_lm_eval_runs(tmp_path, monkeypatch):
    """lm-eval is ended, and the error is the server's."""
    monkeypatch.setattr(harness, "command", lambda *_: ["sleep", "60"])

    def check():
        raise ServeError("the server ended with status -9")

    with pytest.raises(ServeError, match="status -9"):
        harness.run(make_plan(), "http://x", tmp_path, 1, check, lambda _: None)


def test_lm_eval_fails(tmp_path, monkeypatch):
    script = "echo; echo 2026 INFO x; echo 'KeyError: 3'; echo 10%; exit 3"
    monkeypatch.setattr(harness, "command", lambda *_: ["sh", "-c", script.replace("10%", "")])
    with pytest.raises(EvalError, match=r"status 3: KeyError: 3 \(whole log"):
        harness.run(make_plan(), "http://x", tmp_path, 1, lambda: None, lambda _: None)


def test_progress_is_lm_evals_own_count(tmp_path):
    log = tmp_path / "log"
    log.write_text("INFO Building\n")
    assert harness.latest(log) == "loading tasks"
    log.write_text("Requesting API:   2%| | 3/120 [00\rRequesting API:  3%| | 4/120 [00")
    assert harness.latest(log) == "4/120 requests"


def server_that(answers):
    """A stand-in for serve.launch.Server; ``answers`` is raised when it is asked."""

    class Fake:
        def __init__(self, config, run_dir, environ):
            self.command = SimpleNamespace(argv=("python", "--api-key", "secret", "--port", "1"))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            Fake.stopped = True

        wait_healthy = staticmethod(lambda *_: 1.0)
        verify = staticmethod(lambda: SimpleNamespace(kind="live", message=""))
        check_alive = staticmethod(lambda: None)

    def ask(*_):
        raise answers

    return Fake, ask


@pytest.mark.parametrize("kind", ["on", "wrong_sign"])
def test_an_arm_that_cannot_answer(tmp_path, monkeypatch, kind):
    fake, ask = server_that(EvalError("lm-eval ended with status 1: TypeError"))
    monkeypatch.setattr(arm_module, "Server", fake)
    monkeypatch.setattr(arm_module, "ask", ask)
    monkeypatch.setattr(arm_module, "check", lambda *_: None)
    monkeypatch.setattr(arm_module, "SETTLE_S", 0)
    arm = arms_of(("off", kind))[1]
    arguments = make_plan(), arm, tmp_path / "arm", False, threading.Event(), lambda *_: None
    if kind == "on":
        with pytest.raises(EvalError, match="TypeError"):
            arm_module.run_arm(*arguments)
        assert not (tmp_path / "arm" / "arm.json").exists()
    else:
        arm_module.run_arm(*arguments)
        record = json.loads((tmp_path / "arm" / "arm.json").read_text())
        assert "TypeError" in record["failed"]
        assert "secret" not in json.dumps(record)
    assert fake.stopped
