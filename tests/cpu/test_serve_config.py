"""What is refused before a server starts, and the folders of runs."""

from __future__ import annotations

import importlib.metadata
import socket

import pytest

from sglang_trinv.errors import ConfigError, TargetMissing
from sglang_trinv.serve import config as serve_config
from sglang_trinv.serve import tiny_model
from sglang_trinv.serve.config import ServeConfig, ServeError


def without_sglang(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def with_sglang(monkeypatch, release):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: release)


def test_sglang_missing(monkeypatch):
    without_sglang(monkeypatch)
    with pytest.raises(ServeError, match=r"^sglang is not installed: want a release from 0\.5\.9 "):
        serve_config.check_release()


@pytest.mark.parametrize("release", ["0.5.8", "0.5.24", "0.6.0", "nonsense"])
def test_release_out_of_the_table(monkeypatch, release):
    with_sglang(monkeypatch, release)
    with pytest.raises(TargetMissing, match="supported are"):
        serve_config.check_release()
    assert serve_config.check_release("stock") == release


def test_supported_release(monkeypatch):
    with_sglang(monkeypatch, "0.5.20+cu130")
    assert serve_config.check_release() == "0.5.20+cu130"


@pytest.mark.parametrize("model", ["/nowhere", "./nowhere/x/y", "nowhere", "", "a b/c", "-x/y"])
def test_model_that_cannot_exist(model):
    with pytest.raises(ServeError, match="--model: want a model folder or a hub id"):
        serve_config.check_model(model)


def test_folder_without_config(tmp_path):
    with pytest.raises(ServeError, match=r"--model: no config\.json in"):
        serve_config.check_model(str(tmp_path))


@pytest.mark.parametrize("model", [str(tiny_model.PATH), "Qwen/Qwen3.5-0.8B"])
def test_model_that_may_exist(model):
    serve_config.check_model(model)


def test_port_in_use():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=f"--port: {port} on 127.0.0.1 is in use"):
            serve_config.check_port("127.0.0.1", port)
    serve_config.check_port("127.0.0.1", port)


def test_address_of_another_machine():
    with pytest.raises(ServeError, match=r"--host: cannot listen on 192\.0\.2\.1"):
        serve_config.check_port("192.0.2.1", 30000)


@pytest.mark.parametrize("flag", ["--port", "--host", "--model-path", "--model"])
def test_flag_that_has_an_option(flag):
    with pytest.raises(ServeError, match=f"{flag} after `--`"):
        serve_config.check_flags((f"{flag}=1",))


@pytest.mark.parametrize(
    ("name", "value"),
    [("SGLANG_TRINV", "yes"), ("SGLANG_TRINV_METHOD", "mch"), ("SGLANG_TRINV_METHDO", "x")],
)
def test_bad_environment(name, value):
    with pytest.raises(ConfigError, match=name):
        serve_config.check(ServeConfig(device="cpu"), {name: value})


def test_no_gpu_and_no_cpu_platform(monkeypatch):
    with_sglang(monkeypatch, "0.5.20")
    monkeypatch.setattr(serve_config, "platforms", set)
    with pytest.raises(ServeError, match="sglang-trinv-cpu-platform is not installed"):
        serve_config.check(ServeConfig(device="cpu"), {})
