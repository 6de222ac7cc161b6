"""`sglang-trinv serve --ab`: both servers of an A/B test from one command."""

from __future__ import annotations

import signal
import socket
import subprocess
import time

import httpx
import psutil
from openai import OpenAI

from tests.e2e.conftest import FLAGS, clean_environ
from tests.e2e.test_failures import CLI, alive, heed_ctrl_c, until

MESSAGES = [{"role": "user", "content": "Which kernels are you?"}]


def two_free_ports() -> int:
    """The first of two free ports in a row."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def states(url: str) -> tuple[set[str], int]:
    """States of the schedulers, and how many calls our kernels answered."""
    found = httpx.get(f"{url}/trinv/status", trust_env=False).json()["processes"]
    schedulers = [process for process in found if process["role"] == "scheduler"]
    counts = [sum(sum(op.values()) for op in s["calls"].values()) for s in schedulers]
    return {s["state"] for s in schedulers}, sum(counts)


def test_both_arms_answer_and_one_is_ours(tmp_path):
    port = two_free_ports()
    serve = subprocess.Popen(
        [*CLI, "serve", "--ab", "--port", str(port), "--", *FLAGS],
        env=clean_environ(tmp_path / "caches") | {"XDG_RUNTIME_DIR": str(tmp_path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    try:
        for number in (port, port + 1):
            until(serve, f"Serving at http://127.0.0.1:{number}/v1")
        urls = [f"http://127.0.0.1:{number}" for number in (port, port + 1)]
        before = states(urls[0])
        replies = []
        for url in urls:
            client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            answer = client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=8, temperature=0
            )
            replies.append(answer.choices[0].message.content)
        assert all(replies)
        deadline = time.monotonic() + 10  # a status lags its process
        while (ours := states(urls[0]))[1] <= before[1] and time.monotonic() < deadline:
            time.sleep(0.5)
        assert ours[0] == {"installed"}
        assert ours[1] > before[1]
        assert httpx.get(f"{urls[1]}/trinv/status", trust_env=False).status_code == 404
        pids = [child.pid for child in psutil.Process(serve.pid).children(recursive=True)]
        assert len(pids) >= 6
        serve.send_signal(signal.SIGINT)
        assert serve.wait(60) == 0
        assert not [pid for pid in pids if alive(pid)]
    finally:
        if serve.poll() is None:
            serve.kill()
