"""``sglang-trinv status --url`` against servers that answer what a server may answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from sglang_trinv import cli, status

KEY = "sesame"
runner = CliRunner()

Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function: start a server with one answer, return its address."""
    servers = []

    def start(code: int, body: str, key: str = "") -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                allowed = not key or self.headers.get("Authorization") == f"Bearer {key}"
                self.send_response(code if allowed else 401)
                self.end_headers()
                self.wfile.write((body if allowed else "{}").encode())

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answer() -> str:
    process = status.ProcessStatus()
    process.fields.update(state="installed", prefill_backend="triton", on_hot_path=True)
    process.fields["self_check"] = {
        "shape": "K128 V128, Hk16/Hv32", "method": "auto", "seconds": 1.5,
        "cases": [{"kind": "equal keys", "ratio": 0.4}],
    }  # fmt: skip
    process.fields["ranks"] = [
        {"rank": 0, "host": "a", "state": "installed", "version": "0.1.0", "method": "auto"},
        {"rank": 1, "state": "silent", "reason": "does not report"},
    ]
    process.fields["mismatch"] = "rank 1 does not report"
    process.count_call("fwd_intra", "triton")
    scheduler = process.to_dict() | {"role": "scheduler", "alive": True}
    return json.dumps({"server_schema": 1, "live": True, "mismatch": "", "processes": [scheduler]})


def run(*arguments: str):
    return runner.invoke(cli.app, ["status", *arguments])


def test_renders_what_the_server_says(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    url = serve(200, answer(), KEY)
    result = run("--url", url + "/", "--api-key", KEY)
    assert result.exit_code == 0, result.output
    assert "fwd_intra 1 by triton" in result.stdout
    assert "self-check of K128 V128, Hk16/Hv32, method auto, in 1.5 s" in result.stdout
    assert "equal keys 0.40" in result.stdout
    assert "rank 0: a, 0.1.0, auto, installed" in result.stdout
    assert "rank 1: does not report" in result.stdout
    assert "RANKS DIFFER: rank 1 does not report" in result.stdout
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert json.loads(run("--url", url, "--json").stdout)["live"] is True


@pytest.mark.parametrize(
    ("code", "body", "said"),
    [
        (404, "", "has no /trinv/status: the plugin is not loaded in the process that answers"),
        (500, "", "answers 500 to /trinv/status"),
        (200, "<html>", "is not JSON"),
        (200, "[]", "is not what sglang_trinv answers"),
    ],
)
def test_other_answers(serve: Serve, code: int, body: str, said: str) -> None:
    result = run("--url", serve(code, body))
    assert result.exit_code == 1
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_key_is_asked_for_and_not_repeated(serve: Serve) -> None:
    url = serve(200, answer(), KEY)
    for arguments in ((), ("--api-key", "wrong-one")):
        result = run("--url", url, *arguments)
        assert result.exit_code == 1
        assert "--api-key: " in result.stderr
        assert "wrong-one" not in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--url", "localhost:30000"), "--url: want http://HOST:PORT"),
        (("--url", "http://127.0.0.1:9"), "does not answer"),
        (("--url", "http://x", "--run-dir", "/tmp"), "want --url or --run-dir, got both"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert said in result.stderr
