"""ServeConfig -> argv and environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from sglang_trinv.serve import tiny_model
from sglang_trinv.serve.command import CPU_FLAGS, build
from sglang_trinv.serve.config import ServeConfig, flag_value

RUN = Path("/run/1")


def test_cuda_gets_plain_flags():
    config = ServeConfig(model="a/b", device="cuda", port=31000, extra=("--tp", "2"))
    command = build(config, RUN, {"HOME": "/root"}, python="python")
    assert command.argv == (
        "python", "-m", "sglang.launch_server", "--model-path", "a/b",
        "--host", "127.0.0.1", "--port", "31000", "--tp", "2",
    )  # fmt: skip
    assert command.env == {
        "HOME": "/root",
        "PYTHONUNBUFFERED": "1",
        "SGLANG_TRINV": "1",
        "SGLANG_TRINV_RUN_DIR": "/run/1",
    }


def test_cpu_gets_the_platform():
    command = build(ServeConfig(device="cpu"), RUN, {"SGLANG_USE_CPU_ENGINE": "1"})
    assert command.env["SGLANG_PLATFORM"] == "trinv_cpu"
    assert command.env["TRITON_INTERPRET"] == "1"
    assert "SGLANG_USE_CPU_ENGINE" not in command.env
    for flag, value in CPU_FLAGS.items():
        at = command.argv.index(flag)
        assert value is None or command.argv[at + 1] == value
    assert command.argv[command.argv.index("--model-path") + 1] == str(tiny_model.PATH)


@pytest.mark.parametrize("extra", [("--max-total-tokens", "64"), ("--max-total-tokens=64",)])
def test_the_users_flag_wins(extra):
    argv = build(ServeConfig(device="cpu", extra=extra), RUN, {}).argv
    assert sum(part.startswith("--max-total-tokens") for part in argv) == 1
    assert argv[-len(extra) :] == extra


def test_the_users_environment_wins_where_it_may():
    env = build(ServeConfig(device="cpu"), RUN, {"OMP_NUM_THREADS": "8"}).env
    assert env["OMP_NUM_THREADS"] == "8"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_arms_differ_by_one_variable(device):
    ours, stock = (
        build(ServeConfig(device=device, kernels=kernels), RUN, {}) for kernels in ("ours", "stock")
    )
    assert ours.argv == stock.argv
    assert ours.env | {"SGLANG_TRINV": "0"} == stock.env


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ((), None),
        (("--a", "1"), "1"),
        (("--a=1",), "1"),
        (("--a", "1", "--a=2"), "2"),
        (("--ab", "1"), None),
        (("--a",), ""),
    ],
)
def test_flag_value(flags, value):
    assert flag_value(flags, "--a") == value


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:30000"),
        ("0.0.0.0", "http://127.0.0.1:30000"),
        ("::", "http://[::1]:30000"),
    ],
)
def test_url(host, url):
    assert ServeConfig(device="cpu", host=host).url == url


@pytest.mark.parametrize("bad", [{"kernels": "theirs"}, {"port": 0}, {"port": 65536}, {"gpu": 1}])
def test_bad_values(bad):
    with pytest.raises(ValidationError):
        ServeConfig(**{"device": "cpu", **bad})
