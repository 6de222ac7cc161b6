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
from tests.e2e.client import LENGTHS, Client, flat, prompt, rms, true_prompt_logprobs

START_TIMEOUT_S = 600
# Longer prompts are prefilled in parts, which do not end where the kernels' chunks of 64 do.
CHUNK = 96
CHECKED = 12
# Both arms name the prefill backend, as an A/B run must: on a GPU SGLang may choose another one.
FLAGS = ("--chunked-prefill-size", str(CHUNK), "--linear-attn-prefill-backend", "triton")
GPU_FLAGS = ("--mem-fraction-static", "0.2", "--max-total-tokens", "65536")

# A result is as good as stock's if its distance to the truth is at most 1.2 times stock's.
SLACK = 1.2
PROMPTS = [prompt(length) for length in LENGTHS]
KEY = "sesame-street"
UNWRITABLE = "/proc/self/nothing"  # also for root

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
def guarded(make_server: MakeServer) -> Iterator[Server]:
    """A server with a key and metrics, whose third call raises, on a cache that is not there."""
    flags = (*FLAGS, "--api-key", KEY, "--enable-metrics")
    environ = {"SGLANG_TRINV_FAULT": "raise_at_call", "TRITON_CACHE_DIR": UNWRITABLE}
    server = started(make_server("guarded", flags=flags, **environ))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def nan_u(make_server: MakeServer) -> Iterator[Server]:
    """A server whose third call gives NaN, and whose first calls are checked."""
    fault = {"SGLANG_TRINV_FAULT": "nan_u", "SGLANG_TRINV_CHECK": str(CHECKED)}
    server = started(make_server("nan_u", **fault))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def ask_ours(ours: Server) -> Client:
    return Client(ours)


@pytest.fixture(scope="session")
def ask_stock(stock: Server) -> Client:
    return Client(stock)


@pytest.fixture(scope="session")
def truth() -> list[list[float]]:
    """Log probabilities of ``PROMPTS`` in transformers, float32."""
    return [true_prompt_logprobs(ids) for ids in PROMPTS]


@pytest.fixture(scope="session")
def of_stock(ask_stock: Client) -> list[list[float]]:
    """The same of the stock server."""
    return [ask_stock.prompt_logprobs(ids) for ids in PROMPTS]


@pytest.fixture(scope="session")
def tolerance(of_stock: list[list[float]], truth: list[list[float]]) -> float:
    """Stock's own distance to transformers, and some."""
    stock = rms(flat(of_stock), flat(truth))
    assert 0 < stock < 0.2, "the stock server is no measure"
    return SLACK * stock
