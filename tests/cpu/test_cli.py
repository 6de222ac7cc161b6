"""The command line: what it refuses, what it prints, its exit codes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sglang_trinv import __version__, cli, runs
from sglang_trinv.serve import config as serve_config
from sglang_trinv.serve import doctor

runner = CliRunner()


@pytest.fixture(autouse=True)
def _runs(tmp_path, monkeypatch, clean_env):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def refused(*arguments):
    """Standard error of a run that must fail: one line."""
    result = runner.invoke(cli.app, list(arguments))
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_version():
    assert runner.invoke(cli.app, ["--version"]).stdout.strip() == f"sglang-trinv {__version__}"


def test_help_names_the_commands():
    output = runner.invoke(cli.app, ["--help"]).output
    for command in ("serve", "doctor", "status"):
        assert command in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere"], "--model: want a model folder or a hub id OWNER/NAME"),
        (["--kernels", "theirs"], "--kernels: "),
        (["--port", "70000"], "--port: "),
        (["--", "--port", "1"], "--port after `--`"),
    ],
)
def test_serve_refuses(arguments, message):
    assert message in refused("serve", *arguments)


def test_unknown_option_is_a_usage_error():
    result = runner.invoke(cli.app, ["serve", "--tp", "2"])
    assert result.exit_code == 2


def test_port_in_use():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"{port} on 127.0.0.1 is in use" in refused("serve", "--port", port)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SGLANG_TRINV", "on"),
        ("SGLANG_TRINV_METHOD", "mch"),
        ("SGLANG_TRINV_GDN", "whole"),
        ("SGLANG_TRINV_CHECK", "-1"),
        ("SGLANG_TRINV_NO_SUCH", "1"),
    ],
)
def test_wrong_environment(monkeypatch, name, value):
    monkeypatch.setattr(doctor, "_hook_target", lambda: "not looked at")
    monkeypatch.setenv(name, value)
    assert name in refused("serve")
    report = json.loads(runner.invoke(cli.app, ["doctor", "--json"]).stdout)
    assert [c["name"] for c in report["checks"] if not c["ok"] and name in c["detail"]]


def fake_sglang(tmp_path, release):
    """A folder that makes ``importlib.metadata`` believe in this release."""
    info = tmp_path / "site" / f"sglang-{release}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {release}\n")
    return str(info.parent)


def test_sglang_out_of_range_in_a_process_of_its_own(tmp_path):
    path = os.pathsep.join([fake_sglang(tmp_path, "0.6.1"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "sglang_trinv", "serve"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "SGLang 0.6.1 is not in the table" in done.stderr


def test_sglang_missing(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "sglang":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "sglang is not installed" in refused("serve")
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "PROBLEM" in result.stdout


def test_doctor(monkeypatch):
    result = runner.invoke(cli.app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert {check["name"]: check["ok"] for check in report["checks"]} == {
        "versions": True,
        "configuration": True,
        "sglang release": True,
        "plugin entry point": True,
        "hook target": True,
        "device": True,
        "gdn prefill by default": True,
    }
    assert report["ok"]
    assert result.exit_code == 0
    assert "method " in result.stdout


def test_doctor_sees_a_whitelist_without_us(monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    monkeypatch.setattr(doctor, "_hook_target", lambda: "not looked at")
    result = runner.invoke(cli.app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert "SGLANG_PLUGINS: want trinv in the list" in result.stdout


def test_doctor_sees_a_changed_target(monkeypatch):
    probe = "raise RuntimeError('signature of x: want (a), got (b)')"
    monkeypatch.setattr(doctor, "PROBE", probe)
    monkeypatch.setattr(serve_config, "platforms", lambda: {serve_config.PLATFORM})
    check = next(c for c in doctor.examine() if c.name == "hook target")
    assert not check.ok
    assert "want (a), got (b)" in check.detail


def test_doctor_with_the_numeric_check(monkeypatch):
    monkeypatch.setattr(serve_config, "detect_device", lambda: "cpu")
    assert doctor._run("numeric self-check", doctor._numeric) == doctor.Check(
        "numeric self-check", False, "--gpu: want a CUDA GPU, found none"
    )
    monkeypatch.setattr(serve_config, "detect_device", lambda: "cuda")
    good = {"shape": "K128", "method": "auto", "seconds": 1, "cases": [{"kind": "x", "ratio": 0.4}]}
    bad = {"shape": "K64", "error": "SelfCheckFailed: u is wrong"}

    def answers(returncode, *lines):
        out = "".join(f"{json.dumps(line)}\n" for line in lines)
        done = subprocess.CompletedProcess((), returncode, f"warning\n{out}", "Boom\nlast words")
        monkeypatch.setattr(doctor, "_python", lambda *_, env: done)
        return doctor._run("x", doctor._numeric)

    assert answers(0, good).ok
    assert "x 0.40" in answers(0, good).detail
    assert answers(1, good, bad) == doctor.Check("x", False, "K64: SelfCheckFailed: u is wrong")
    assert answers(-11) == doctor.Check("x", False, "last words")


def test_doctor_reports_for_a_bug_report(monkeypatch):
    monkeypatch.setenv("SGLANG_TRINV_CHECK", "3")
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    report = doctor.report([])
    assert report["settings"]["SGLANG_TRINV_CHECK"] == "3"
    assert report["processes"] == []
    write_status(runs.new_run_dir(), os.getpid())
    report = doctor.report([])
    assert report["processes"][0]["state"] == "installed"
    assert "sesame" not in json.dumps(report)


def test_status(tmp_path):
    assert "no run in" in refused("status")
    assert "no folder" in refused("status", "--run-dir", "/nowhere")
    run = runs.new_run_dir()
    assert "no process has written" in refused("status")
    write_status(run, os.getpid())
    result = runner.invoke(cli.app, ["status"])
    assert result.exit_code == 0
    assert "7 by triton" in result.stdout
    found = json.loads(runner.invoke(cli.app, ["status", "--json", "--run-dir", str(run)]).stdout)
    assert found[0]["calls"]["fwd_intra"]["triton"] == 7


def test_status_of_a_dead_server(tmp_path):
    write_status(runs.new_run_dir(), 2**22 + 1)
    result = runner.invoke(cli.app, ["status"])
    assert result.exit_code == 1
    assert "(gone)" in result.stdout


def write_status(run, pid):
    """A real status file, of this process, under another pid."""
    from sglang_trinv import status

    process = status.ProcessStatus(None)  # with a folder, its thread could still write its own file
    process.update(state="installed", prefill_backend="triton", on_hot_path=True)
    for _ in range(7):
        process.count_call("fwd_intra", "triton")
    content = process.to_dict() | {"role": "scheduler", "pid": pid}
    (run / f"scheduler-{pid}.json").write_text(json.dumps(content))
