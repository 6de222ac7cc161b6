"""Many requests at once, clients that go away, and bodies that are no requests."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from sglang_trinv.serve import health
from tests.e2e.client import Client, body_of, prompt, true_prompt_logprobs
from tests.e2e.conftest import SLACK

REQUESTS = 24
LONGEST = 200
SETTLE_S = 60.0
IDLE_S = 0.3  # of three seconds


def lengths():
    """1 to 200 tokens, as many short ones as long ones on a logarithmic scale."""
    source = random.Random(0)
    return [1, LONGEST, *(round(LONGEST ** source.random()) for _ in range(REQUESTS - 2))]


def connection(server):
    return http.client.HTTPConnection(server.config.host, server.config.port, timeout=300)


def post(server, path, body):
    """Status code and body of the answer to ``body``: bytes, or anything that JSON can hold."""
    made = connection(server)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    made.request("POST", path, data, {"Content-Type": "application/json"})
    answer = made.getresponse()
    text = answer.read().decode(errors="replace")
    made.close()
    return answer.status, text


def wait_idle(server):
    """The scheduler, which sleeps when it has nothing to do, stops using its core."""
    (status,) = Client(server).schedulers()
    scheduler, deadline = psutil.Process(status["pid"]), time.monotonic() + SETTLE_S
    before = None
    while time.monotonic() < deadline:
        now = sum(scheduler.cpu_times()[:2])
        if before is not None and now - before < IDLE_S:
            return
        before = now
        time.sleep(3)
    raise AssertionError("the scheduler still works")


def load(server):
    """Many requests at once, a third of which give up; (job, answer or None) of each."""
    source = random.Random(1)
    jobs = [
        (uuid.uuid4().hex, prompt(n, seed=100 + i), source.random() < 1 / 3)
        for i, n in enumerate(lengths())
    ]
    delays = [source.random() for _ in jobs]
    start = threading.Barrier(REQUESTS)

    def ask(job, delay):
        rid, ids, cancelled = job
        start.wait()
        if not cancelled:
            code, text = post(server, "/generate", body_of(ids, rid))
            assert code == 200, text
            return json.loads(text)
        made = connection(server)
        made.request("POST", "/generate", json.dumps(body_of(ids, rid, max_new_tokens=100)))
        time.sleep(delay)
        made.close()
        return None

    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(zip(jobs, pool.map(ask, jobs, delays), strict=True))


def test_concurrent_requests_with_cancels(ours, stock):
    """Nothing is lost, doubled or mixed up, and all is as near to the truth as from stock."""
    with ThreadPoolExecutor(2) as pool:
        of_ours, of_stock = pool.map(load, (ours, stock))
    errors = []
    for answers in (of_ours, of_stock):
        found, truth = [], []
        for (rid, ids, cancelled), answer in answers:
            assert (answer is None) is cancelled
            if answer is not None:
                meta = answer["meta_info"]
                assert meta["id"] == rid
                assert [token for _, token, _ in meta["input_token_logprobs"]] == ids
                assert meta["completion_tokens"] == 1
                found += [value for value, _, _ in meta["input_token_logprobs"][1:]]
                truth += true_prompt_logprobs(ids)
        assert len(found) > 300
        # The mean, not its square: what runs together is chance, and a few tokens make the square.
        errors.append(sum(abs(a - b) for a, b in zip(found, truth, strict=True)) / len(found))
    assert sum(answer is None for _, answer in of_ours) > 3
    assert 0 < errors[0] <= SLACK * errors[1]
    wait_idle(ours)
    assert all(status["fallbacks"] == {} for status in Client(ours).schedulers())


def test_client_leaves_in_the_middle_of_a_stream(ours):
    """The scheduler drops the request long before its last token."""
    made = connection(ours)
    body = body_of(prompt(10, seed=9), uuid.uuid4().hex, max_new_tokens=5000) | {"stream": True}
    made.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    answer = made.getresponse()
    assert answer.status == 200
    assert answer.readline().startswith(b"data: {")
    answer.close()
    made.close()
    wait_idle(ours)


BODIES = {
    "empty": ("/generate", b""),
    "cut off": ("/generate", b"{"),
    "not UTF-8": ("/generate", b"\xff\xfe\x00"),
    "deep": ("/generate", b"[" * 100_000),
    "a list": ("/generate", []),
    "no prompt": ("/generate", {"sampling_params": {}}),
    "text for ids": ("/generate", {"input_ids": "text"}),
    "temperature": ("/generate", {"text": "x", "sampling_params": {"temperature": -1}}),
    "too many ids": ("/generate", {"input_ids": [7] * 100_000}),
    "too long": ("/generate", {"text": "x" * (1 << 20)}),
    "32 MiB": ("/generate", {"unknown": "x" * (32 << 20)}),
    "a word for a number": ("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": "many"}),
    "no messages": ("/v1/chat/completions", {"model": "m"}),
    "empty messages": ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user"}] * 2}),
    "text for messages": ("/v1/chat/completions", {"model": "m", "messages": "x" * (8 << 20)}),
}


@pytest.mark.parametrize("name", BODIES)
def test_body_that_is_no_request(ours, name):
    code, text = post(ours, *BODIES[name])
    assert 400 <= code < 500, text[:500]
    assert "Traceback" not in text
    ours.check_alive()


def test_server_is_well_after_all_that(ours):
    assert health.ready(ours.config.url)
    assert len(Client(ours).prompt_logprobs(prompt(30, seed=10))) == 29
    wait_idle(ours)
