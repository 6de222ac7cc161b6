"""Run folders: resuming, arms that fail, two runs at once, and how it is told."""

from __future__ import annotations

import errno
import fcntl
import json
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sglang_trinv import cli
from sglang_trinv.evals import cli as evals_cli
from sglang_trinv.evals import harness, plan, run, samples
from sglang_trinv.evals.errors import EvalError
from sglang_trinv.evals.plan import Plan, arms_of, opened, parse_arms, parse_model_args
from sglang_trinv.serve import tiny_model
from sglang_trinv.serve.config import ServeError
from tests.evals.conftest import documents, probe

FIELDS = {
    "suite": "quick", "tasks": ("gdn_quick",), "model": str(tiny_model.PATH), "fingerprint": "f",
    "device": "cpu", "arms": ("off", "on"), "limit": None, "model_args": {}, "prefix_cache": False,
    "flags": (), "settings": {}, "sglang": "0.5.20", "sglang_trinv": "0.1.0", "lm_eval": "0.4.13",
}  # fmt: skip


def make_plan(**changes) -> Plan:
    return Plan(**{**FIELDS, **changes})


def leave(plan, arm, folder, *_, correct=(True, False) * 20, record=None) -> None:
    """What a finished arm leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    samples.save(folder / "documents.jsonl", documents(correct, [-0.1] * len(correct)))
    probe().save(folder / "probe.npz")
    ours = arm.kernels == "ours"
    content = {
        "kind": arm.kind, "repeat": arm.repeat, "kernels": arm.kernels, "backend": arm.backend,
        "concurrency": 2, "environ": arm.environ({}), "argv": ["--port", "1"], "calls": 9 * ours,
        "fallbacks": 0, "status": [], "server": {"attention_backend": "x"}, "ready_s": 1.0,
        "seconds": 2.0, "versions": {"sglang": "0.5.20"}, **(record or {}),
    }  # fmt: skip
    (folder / "arm.json").write_text(json.dumps(content))


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
    configs = [run.serve_config(make_plan(), arm, shared=False) for arm in (off, on)]
    one, two = (c.model_dump(exclude={"port"}) for c in configs)
    assert one | {"kernels": "ours"} == two
    assert "--disable-radix-cache" in one["extra"]
    assert one["extra"][:2] == ("--linear-attn-prefill-backend", "triton")
    cached = run.serve_config(make_plan(prefix_cache=True, flags=("--x", "1")), on, shared=True)
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
        run.shutil.rmtree(folder, ignore_errors=True)
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


def finished_run(folder, arms=("off", "on"), record=None, **changes):
    made = make_plan(arms=arms, **changes)
    with opened(folder, made):
        for arm in arms_of(made.arms):
            leave(made, arm, folder / "arms" / arm.name, record=record)


def test_compare_judges_again_and_writes_a_report(tmp_path):
    finished_run(tmp_path / "a")
    found = invoke("compare", str(tmp_path / "a"))
    assert found.exit_code == 0, found.output
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert (report["verdict"], report["exit_code"]) == ("EQUIVALENT", 0)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "EQUIVALENT" in page
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
