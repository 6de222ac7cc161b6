"""Servers that the tests share: one of each kind, started when the first test asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sglang_trinv.serve import tiny_model
from sglang_trinv.serve.config import ServeConfig, check, detect_device, free_port
from sglang_trinv.serve.launch import Server
from tests.e2e.client import Client

START_TIMEOUT_S = 600
# Longer prompts are prefilled in parts, which do not end where the kernels' chunks of 64 do.
CHUNK = 96
CHECKED = 12
# Both arms name the prefill backend, as an A/B run must: on a GPU SGLang may choose another one.
FLAGS = ("--chunked-prefill-size", str(CHUNK), "--linear-attn-prefill-backend", "triton")
GPU_FLAGS = ("--mem-fraction-static", "0.2", "--max-total-tokens", "65536")

MakeServer = Callable[..., Server]


@pytest.fixture(scope="session")
def make_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeServer]:
    """Return a function that makes a server, not started yet; all are stopped at the end."""
    device = detect_device()
    caches = tmp_path_factory.mktemp("caches")
    with ExitStack() as stack:

        def make(
            name: str,
            kernels: str = "ours",
            model: Path = tiny_model.PATH,
            flags: tuple[str, ...] = FLAGS,
            **environ: str,
        ) -> Server:
            extra = flags + (GPU_FLAGS if device == "cuda" else ())
            config = ServeConfig(
                model=str(model), kernels=kernels, device=device, port=free_port(), extra=extra
            )
            environ = {**clean_environ(caches), **environ}
            check(config, environ)
            server = Server(config, tmp_path_factory.mktemp(name), environ)
            stack.callback(server.stop)
            return server

        yield make


def clean_environ(caches: Path) -> dict[str, str]:
    """The caller's environment without settings of ours, with caches that end with the tests."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SGLANG", "TRITON_INTERPRET"))}
    return {
        **kept,
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }


def started(server: Server) -> Server:
    """``server``, healthy."""
    server.start()
    server.wait_healthy(timeout_s=START_TIMEOUT_S)
    return server


@pytest.fixture(scope="session")
def ours(make_server: MakeServer) -> Server:
    """Our kernels; every fallback would be an error, the first calls are compared with stock."""
    strict = {"SGLANG_TRINV_STRICT": "1", "SGLANG_TRINV_CHECK": str(CHECKED)}
    return started(make_server("ours", **strict))


@pytest.fixture(scope="session")
def stock(make_server: MakeServer) -> Server:
    """SGLang's kernels, everything else the same."""
    return started(make_server("stock", kernels="stock"))


@pytest.fixture(scope="session")
def zero_u(make_server: MakeServer) -> Iterator[Server]:
    """The negative control: our kernels, then u multiplied by zero."""
    fault = {"SGLANG_TRINV_FAULT": "zero_u", "SGLANG_TRINV_CHECK": str(CHECKED)}
    server = started(make_server("zero_u", **fault))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def ask_ours(ours: Server) -> Client:
    return Client(ours)


@pytest.fixture(scope="session")
def ask_stock(stock: Server) -> Client:
    return Client(stock)
