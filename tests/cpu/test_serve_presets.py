"""``serve --preset`` and ``--ab``: what would be run, as a user sees it."""

from __future__ import annotations

import argparse
import os
import shlex

import pytest
from typer.testing import CliRunner

from sglang_trinv import cli
from sglang_trinv.serve import ab, presets
from sglang_trinv.serve import config as serve_config
from sglang_trinv.serve.config import ServeConfig, ServeError, flag_value

runner = CliRunner()


def dry_run(*arguments):
    """The commands that are printed: (variables, words) of each line."""
    result = runner.invoke(cli.app, ["serve", "--dry-run", *arguments])
    assert result.exit_code == 0, result.output
    found = []
    for line in result.stdout.strip().splitlines():
        words = shlex.split(line)
        i = words.index("python")
        found.append((dict(word.split("=", 1) for word in words[:i]), tuple(words[i:])))
    return found


def refused(*arguments):
    result = runner.invoke(cli.app, ["serve", *arguments])
    assert result.exit_code == 1, result.output
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    return line


@pytest.mark.parametrize("name", presets.PRESETS)
def test_each_preset_is_shown_with_its_source(name, clean_env):
    ((variables, words),) = dry_run("--preset", name)
    preset = presets.PRESETS[name]
    assert variables["SGLANG_TRINV"] == "1"
    assert flag_value(words, "--model-path") == preset.model
    for flag, value in preset.flags:
        assert flag_value(words, flag) is not None
        assert value is None or flag_value(words, flag) == value
    assert "--device" not in words  # for a GPU, wherever it is shown
    said = runner.invoke(cli.app, ["serve", "--dry-run", "--preset", name]).stderr
    assert preset.source in said
    assert presets.COOKBOOK in preset.source


def test_sglang_knows_every_flag():
    """Of the installed release, on the CPU platform."""
    pytest.importorskip("sglang")
    os.environ.setdefault("SGLANG_PLATFORM", serve_config.PLATFORM)
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    ours = {flag for preset in presets.PRESETS.values() for flag, _ in preset.flags}
    assert ours <= known


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_flag_can_be_replaced_and_left_out(name):
    preset = presets.PRESETS[name]
    for flag, value in preset.flags:
        given = (flag,) if value is None else (flag, "other")
        merged = presets.merge(preset, given)
        assert merged[-len(given) :] == given
        assert merged.count(flag) == 1
        assert merged.count("other") == (value is not None)
        assert flag not in presets.merge(preset, (), [flag])


def test_an_alias_replaces_too():
    preset = presets.PRESETS["qwen3.5-397b-a17b"]
    for given in (("--tp", "4"), ("--tensor-parallel-size=4",)):
        assert "--tp-size" not in presets.merge(preset, given)


def test_the_users_model_wins(clean_env):
    ((_, words),) = dry_run("--preset", "qwen3.5-9b", "--model", "Qwen/Qwen3.6-9B")
    assert flag_value(words, "--model-path") == "Qwen/Qwen3.6-9B"


def test_bad_choices(monkeypatch, clean_env):
    monkeypatch.setattr(serve_config, "detect_device", lambda: "cpu")
    assert "--preset: want one of qwen3.5-4b" in refused("--preset", "qwen4")
    assert "--preset: want a GPU, found none" in refused("--preset", "qwen3.5-4b")
    assert "--without: want a --preset" in refused("--without", "--tp-size")
    wanted = "--without: want one of --tp-size, got '--page-size'"
    bad = ("--preset", "qwen3-next", "--without", "--page-size", "--dry-run")
    assert wanted in refused(*bad)
    assert "--ab: serves both kernels" in refused("--ab", "--kernels", "stock")


def test_two_arms_differ_by_one_variable(monkeypatch, clean_env):
    monkeypatch.setattr(serve_config, "detect_device", lambda: "cpu")
    (ours, words), (stock, others) = dry_run("--ab", "--port", "4000")
    assert (ours.pop("SGLANG_TRINV"), stock.pop("SGLANG_TRINV")) == ("1", "0")
    assert ours == stock
    assert [a for a, b in zip(words, others, strict=True) if a != b] == ["4000"]
    assert flag_value(words, ab.PREFILL) == "triton"


def test_arms_on_gpus():
    config = ServeConfig(device="cuda", extra=("--tp", "2"))
    ours, stock = ab.arms(config, gpus=4)
    assert flag_value(stock.extra, "--base-gpu-id") == "2"
    assert flag_value(ours.extra, "--base-gpu-id") is None
    ours, stock = ab.arms(config, gpus=2)
    memory = [flag_value(arm.extra, ab.MEMORY) for arm in (ours, stock)]
    assert memory == ["0.4", "0.6"]
    given = ServeConfig(device="cuda", extra=(ab.MEMORY, "0.3", ab.PREFILL, "flashinfer"))
    for arm in ab.arms(given, gpus=1):
        assert arm.extra == given.extra


def test_an_arm_that_fails_stops_the_other(monkeypatch, tmp_path):
    states = {}

    class FakeServer:
        def __init__(self, config, run_dir):
            self.config = config

        def __enter__(self):
            states[self.config.kernels] = "started"
            return self

        def __exit__(self, *_):
            states[self.config.kernels] = "stopped"

    def begin(server):
        if server.config.kernels == "stock":
            raise ServeError("no memory")

    monkeypatch.setattr(ab, "Server", FakeServer)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    arms = ab.arms(ServeConfig(device="cpu"))
    with pytest.raises(ServeError, match="no memory"), ab.servers(arms, begin):
        pass
    assert states == {"ours": "stopped", "stock": "stopped"}
