"""docs/operations.md: its commands parse, its files verify, the names in it exist."""

from __future__ import annotations

import argparse
import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from sglang_trinv import cli, metrics, status
from sglang_trinv.config import VARIABLES
from sglang_trinv.serve import config as serve_config

TEXT = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


COMMANDS = [shlex.split(x, comments=True) for block in blocks("bash") for x in block.splitlines()]
OURS = [words[1:] for words in COMMANDS if words[0] == "sglang-trinv"]
DOCKER = dict(line.split(" ", 1) for line in blocks("dockerfile")[0].splitlines())
SERVICE = blocks("ini")[0]


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_our_commands_parse(words):
    command = typer.main.get_command(cli.app)
    if ">" in words:
        words = words[: words.index(">")]
    context = command.make_context("sglang-trinv", list(words), resilient_parsing=False)
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, list(words), parent=context)
    extra = context.args
    assert not extra or extra[0].startswith("--")
    known_to_sglang(extra)


def served():
    """Arguments of every `sglang serve` in the document."""
    found = [words[2:] for words in COMMANDS if words[:2] == ["sglang", "serve"]]
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read_string(SERVICE)
    start = shlex.split(parser["Service"]["ExecStart"])
    assert start[0].endswith("/sglang")
    entry = [x.strip('",[] ') for x in (DOCKER["ENTRYPOINT"] + DOCKER["CMD"]).split(",")]
    return [*found, start[2:], [x for x in entry if x.startswith("--")]]


@pytest.mark.parametrize("words", served(), ids=" ".join)
def test_sglang_knows_the_flags(words):
    assert words
    known_to_sglang(words)


def known_to_sglang(words):
    flags = {word for word in words if word.startswith("--")}
    pytest.importorskip("sglang")
    os.environ.setdefault("SGLANG_PLATFORM", serve_config.PLATFORM)
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    assert flags <= known


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is missing")
def test_systemd_takes_the_unit(tmp_path):
    """With this Python in the place of the command, which must exist."""
    unit = tmp_path / "sglang-trinv.service"
    unit.write_text(SERVICE.replace("/opt/sglang/bin/sglang", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "sglang-trinv.service" in line]
    assert said == []
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=sometimes"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert "sglang-trinv.service:" in done.stderr  # the check can fail


def test_container_file():
    known = {"FROM", "COPY", "RUN", "ENV", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert set(DOCKER) <= known
    assert list(DOCKER)[0] == "FROM"
    for name in ("ENTRYPOINT", "CMD"):
        assert json.loads(DOCKER[name])
    folder = DOCKER["COPY"].split()[1]
    assert f"{folder}/unpack.py" in DOCKER["RUN"]


def test_names_exist():
    process = status.ProcessStatus().to_dict() | {"title": "sglang::scheduler"}
    process["self_check"] = {"worst_ratio": 0.5}
    series = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in metrics.StatusCollector(lambda: [process]).collect()
    }
    assert set(re.findall(r"`(sglang_trinv_\w+)`", TEXT)) == series
    assert set(re.findall(r"\bSGLANG_TRINV\w*", TEXT)) <= set(VARIABLES)
    rows = set(re.findall(r"^\| `(\w+)` \| ", TEXT, re.MULTILINE))
    assert rows == {"state", *status.STATES} | series
