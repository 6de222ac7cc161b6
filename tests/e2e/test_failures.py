"""Models and installations that our kernels cannot serve, and the command line around a server."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from sglang_trinv.serve import tiny_model
from sglang_trinv.serve.config import ServeError
from sglang_trinv.serve.tiny_model import layout
from tests.e2e.client import Client, prompt
from tests.e2e.conftest import clean_environ, started

LLAMA_FLAGS = ("--chunked-prefill-size", "96")


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A model with full attention alone, random weights, the tokenizer of the embedded model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=layout.VOCAB,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        eos_token_id=layout.TOKEN_ID["<|im_end|>"],
        pad_token_id=layout.TOKEN_ID["<|endoftext|>"],
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model.PATH / name, folder)
    return folder


def heed_ctrl_c() -> None:
    """A shell lets what it starts in the background ignore SIGINT: the tests may run there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_command_line_serves_a_model_without_linear_attention(llama, make_server, tmp_path):
    """`serve` says that the plugin is idle, `status` sees it, Ctrl-C leaves no process."""
    port = make_server("unused", model=llama, flags=()).config.port
    environ = clean_environ(tmp_path / "caches") | {"XDG_RUNTIME_DIR": str(tmp_path)}
    serve = subprocess.Popen(
        [*CLI, "serve", "--model", str(llama), "--port", str(port), "--", *LLAMA_FLAGS],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    try:
        said = until(serve, "Serving at")
        assert "idle: nothing to replace" in said
        assert "no Gated DeltaNet layer" in said
        found = json.loads(run("status", "--json", environ=environ).stdout)
        assert [s["state"] for s in found if s["role"] == "scheduler"] == ["idle"]
        second = run("serve", "--model", str(llama), "--port", str(port), environ=environ)
        assert second.returncode == 1
        assert second.stderr.strip() == f"error: --port: {port} on 127.0.0.1 is in use"
        pids = [child.pid for child in psutil.Process(serve.pid).children(recursive=True)]
        assert len(pids) >= 3
        serve.send_signal(signal.SIGINT)
        assert serve.wait(60) == 0
        assert not [pid for pid in pids if alive(pid)]
        assert run("status", environ=environ).returncode == 1
    finally:
        if serve.poll() is None:
            serve.kill()  # the kernel kills the server with it


@pytest.mark.parametrize("fault", ["raise_at_install", "wrong_at_start"])
def test_strict_exception_at_install(make_server, fault):
    """The server does not start, and one line says why; so too if the self-check disagrees."""
    server = make_server("strict", SGLANG_TRINV_STRICT="1", SGLANG_TRINV_FAULT=fault)
    with pytest.raises(ServeError, match="the server ended with status"):
        started(server)
    server.stop()
    said = [line for line in Client(server).log().splitlines() if line.startswith("sglang_trinv:")]
    assert len(said) == 1
    assert {"raise_at_install": fault, "wrong_at_start": "self-check: error of u"}[fault] in said[0]
    assert "SGLANG_TRINV_STRICT=1" in said[0]


def test_kernel_that_does_not_compile(make_server):
    """By default SGLang's kernels serve, with one warning; `serve` would call it an error."""
    server = started(make_server("default", SGLANG_TRINV_FAULT="compile_error"))
    client = Client(server)
    assert len(client.prompt_logprobs(prompt(40))) == 39
    (status,) = client.schedulers()
    assert status["state"] == "failed"
    assert "compile_error" in status["reason"]
    assert sum(status["fallbacks"].values()) == 1
    assert not any(client.calls().values())
    warnings = [line for line in client.log().splitlines() if "SGLang's own kernels serve" in line]
    assert len(warnings) == 1
    with pytest.raises(ServeError, match="state failed"):
        server.verify()
    server.stop()


def test_wrong_setting_stops_the_plain_sglang_command(make_server):
    """Without our launcher, which would refuse it, the plugin itself ends the server."""
    server = make_server("setting")
    server.command.env["SGLANG_TRINV_METHOD"] = "mch"
    with pytest.raises(ServeError, match="the server ended with status 1"):
        started(server)
    said = [line for line in Client(server).log().splitlines() if line.startswith("sglang_trinv:")]
    assert len(said) == 1
    assert "SGLANG_TRINV_METHOD" in said[0]


CLI = (sys.executable, "-m", "sglang_trinv")


def run(*arguments, environ):
    return subprocess.run(
        [*CLI, *arguments], env=environ, capture_output=True, text=True, timeout=300
    )


def alive(pid):
    """A zombie is dead: whether it goes away is up to the machine's first process."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(process, text, timeout_s=600):
    """Standard error of ``process`` up to the line that holds ``text``."""
    said, deadline = "", time.monotonic() + timeout_s
    while text not in said and time.monotonic() < deadline:
        line = process.stderr.readline()
        assert line or process.poll() is None, f"ended with {process.returncode}:\n{said}"
        said += line
    return said
