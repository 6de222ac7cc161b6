"""What an operator sees and what a server survives: routes, keys, faults, the end of a process."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from sglang_trinv.serve import health
from sglang_trinv.serve.config import ServeError, free_port
from sglang_trinv.serve.health import IMPLEMENTATION
from sglang_trinv.status import read_run_dir
from tests.e2e.client import Client, body_of, prompt
from tests.e2e.conftest import CHECKED, KEY, UNWRITABLE

LAYERS = 3


def get(server, path, key=""):
    """Status code and text of a GET."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(server.config.url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def command(*arguments, **environ):
    return subprocess.run(
        [sys.executable, "-m", "sglang_trinv", *arguments],
        env={**os.environ, **environ}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("path", ["/trinv/status", "/trinv/metrics"])
@pytest.mark.parametrize("key", ["", "wrong"])
def test_nothing_leaks_without_the_key(guarded, path, key):
    code, text = get(guarded, path, key)
    assert code == 401
    assert json.loads(text) == {"error": "Unauthorized"}


def test_sglangs_metrics_stay_open_and_hold_none_of_ours(guarded):
    code, text = get(guarded, "/metrics")
    assert code == 200
    assert "sglang:" in text
    assert "sglang_trinv" not in text
    assert "sglang_trinv_info" in get(guarded, "/metrics", KEY)[1]


def test_a_kernel_that_raises_once(guarded):
    """SGLang's kernel answers that call; the request never notices, and it is counted."""
    client = Client(guarded)
    logprobs = client.prompt_logprobs(prompt(40, seed=5))
    assert len(logprobs) == 39
    assert all(map(math.isfinite, logprobs))
    (status,) = client.schedulers()
    assert status["fallbacks"] == {"RuntimeError: SGLANG_TRINV_FAULT=raise_at_call": 1}
    warnings = [x for x in client.log().splitlines() if "SGLang's own kernel answers" in x]
    assert len(warnings) == 1


def test_status_and_metrics_count_the_same(guarded):
    client = Client(guarded)
    implementation = IMPLEMENTATION[guarded.config.device]
    count = client.calls()[implementation]
    assert count > 0
    found = json.loads(get(guarded, "/trinv/status", KEY)[1])
    assert found["live"] is True
    assert KEY not in json.dumps(found)
    (scheduler,) = [p for p in found["processes"] if p["role"] == "scheduler"]
    assert scheduler["calls"]["fwd_intra"][implementation] == count
    assert 0 < scheduler["self_check"]["worst_ratio"] <= 1
    line = f'sglang_trinv_calls_total{{by="{implementation}",op="fwd_intra",process="scheduler"}}'
    for path in ("/metrics", "/trinv/metrics"):
        assert f"{line} {float(count)}" in get(guarded, path, KEY)[1]


def test_command_line_asks_the_server(guarded):
    done = command("status", "--url", guarded.config.url, OPENAI_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert "hook live" in done.stdout
    assert "self-check of K128 V128" in done.stdout
    assert "1 answered by stock: RuntimeError" in done.stdout
    done = command("status", "--url", guarded.config.url, OPENAI_API_KEY="")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --api-key:")


def test_cache_that_cannot_be_written(guarded):
    """Warned about once, and a temporary folder in its place; SGLang itself says nothing of it."""
    lines = Client(guarded).log().splitlines()
    said = [x for x in lines if f"the Triton cache {UNWRITABLE} cannot be written" in x]
    assert len(said) == 1
    assert "kernels go to" in said[0]


def test_two_servers_at_once(guarded, ours):
    """Each has its own folder, counts and port."""
    before = Client(ours).calls()
    Client(guarded).generate(prompt(20, seed=6))
    assert Client(ours).calls() == before
    assert guarded.run_dir != ours.run_dir


def test_nan_is_caught_by_the_check(nan_u):
    client = Client(nan_u)
    client.generate(prompt(40, seed=7))
    client.calls()  # the counts have come to rest
    (status,) = client.schedulers()
    assert status["check"]["non_finite"] == status["check"]["disagreements"] == 1
    assert 1 < status["check"]["done"] <= CHECKED
    said = [x for x in client.log().splitlines() if "check: error of u is nan" in x]
    assert len(said) == 1


@pytest.fixture
def router(ours, nan_u):
    """SGLang's router in front of two servers with the plugin."""
    pytest.importorskip("sglang_router", reason="sglang-router is not installed")
    port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--prometheus-port", str(free_port())]
    command += ["--policy", "round_robin", "--worker-urls", ours.config.url, nan_u.config.url]
    # A busy CPU server answers its health check, which generates a token, late.
    command += ["--health-check-timeout-secs", "60", "--health-failure-threshold", "20"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield ours.config.model_copy(update={"port": port}), process
    process.kill()
    process.wait()


def test_router_with_a_worker_killed_in_the_middle(router, ours, nan_u):
    """Every request is answered, by the worker that is left if need be."""
    config, process = router
    deadline = time.monotonic() + 120
    while not health.ready(config.url) or healthy_workers(config) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(1)
    (status,) = Client(nan_u).schedulers()
    before = {server: batches(server) for server in (ours, nan_u)}
    answers = []

    def ask(i):
        ids = prompt(10 + i, seed=20)
        answers.append((len(ids), health.post(config, "/generate", body_of(ids, uuid.uuid4().hex))))

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, i) for i in range(16)]
        while len(answers) < 6:
            time.sleep(0.05)
        os.kill(status["pid"], signal.SIGKILL)
        for each in asked:
            each.result()
    assert all(batches(server) > before[server] for server in before)  # both had a share
    assert len(answers) == 16
    assert all(found["meta_info"]["prompt_tokens"] == n for n, found in answers)


def healthy_workers(config):
    with urllib.request.urlopen(f"{config.url}/workers", timeout=30) as answer:
        return sum(worker["is_healthy"] for worker in json.load(answer)["workers"])


def batches(server):
    return Client(server).log().count("Prefill batch")


def test_scheduler_killed(nan_u):
    """The server ends by itself, is reported as dead, and leaves no process."""
    everyone = list(nan_u.seen)
    (status,) = [s for s in read_run_dir(nan_u.run_dir) if s["role"] == "scheduler"]
    if status["alive"]:
        os.kill(status["pid"], signal.SIGKILL)
    assert nan_u.process.wait(60) != 0
    with pytest.raises(ServeError, match="the server ended with status"):
        nan_u.check_alive()
    gone, alive = psutil.wait_procs(everyone, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    done = command("status", "--run-dir", str(nan_u.run_dir))
    assert done.returncode == 1
    assert f"scheduler {status['pid']} (gone)" in done.stdout


def test_sigterm_during_prefill(guarded):
    """The request that runs is answered, a new one is not taken, no process stays."""
    client, answers = Client(guarded), []

    def ask():
        answers.append(client.prompt_logprobs(prompt(200, seed=8)))

    batches = client.log().count("Prefill batch")
    asking = threading.Thread(target=ask)
    asking.start()
    deadline = time.monotonic() + 60
    while client.log().count("Prefill batch") == batches and time.monotonic() < deadline:
        time.sleep(0.05)
    everyone = guarded.processes()
    guarded.process.send_signal(signal.SIGTERM)
    asking.join(120)
    assert [len(found) for found in answers] == [199]
    guarded.process.wait(60)
    gone, alive = psutil.wait_procs(everyone, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert not health.ready(guarded.config.url, timeout_s=2)
