"""The real server on a GPU: hook live, calls counted, log probabilities as true as stock's.

"ours" replaces the step around the inverse, "full" the whole prefill. The tiny model is served in
the layout with a vision tower, which releases from 0.5.16 on know.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI

from sglang_trinv.serve import health
from sglang_trinv.serve.tiny_model import make
from tests.e2e.client import Client, true_prompt_logprobs
from tests.gpu.servers import Arm, running

pytestmark = pytest.mark.gpu

LENGTHS = (1, 64, 100, 1000, 5000)
LAYERS = 3
CONTINUED = 8
OPS = {"ours": "fwd_intra", "full": "chunk_gated_delta_rule"}
SAID = {"ours": "GDN intra-chunk inverse replaced", "full": "whole GDN prefill replaced"}
CHECKED = 1000  # warm-up and readiness probes come first, with rows of zeros


def prompt(length: int) -> list[int]:
    source = random.Random(length)
    return [source.randrange(32, 127) for _ in range(length)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Client]]:
    """stock, ours, the whole prefill, and ours with u multiplied by zero, all running at once."""
    model = tmp_path_factory.mktemp("model")
    make.write(model, "conditional")
    strict = {"SGLANG_TRINV_STRICT": "1", "SGLANG_TRINV_CHECK": str(CHECKED)}
    arms = {
        "stock": Arm(None),
        "ours": Arm({**strict, "SGLANG_TRINV_GDN": "intra"}),
        "full": Arm({**strict, "SGLANG_TRINV_GDN": "full"}),
        "zero_u": Arm({"SGLANG_TRINV_GDN": "intra", "SGLANG_TRINV_FAULT": "zero_u"}),
    }
    with running(model, arms, tmp_path_factory.mktemp("runs")) as clients:
        yield clients


@pytest.fixture(scope="module")
def logprobs(servers: dict[str, Client]) -> dict[str, list[list[float]]]:
    return {
        name: [client.prompt_logprobs(prompt(n)) for n in LENGTHS]
        for name, client in servers.items()
    }


def distance(x: list[list[float]], y: list[list[float]]) -> dict[str, float]:
    gaps = [abs(a - b) for p, q in zip(x, y, strict=True) for a, b in zip(p, q, strict=True)]
    assert all(map(math.isfinite, gaps))
    rms = math.sqrt(sum(gap**2 for gap in gaps) / len(gaps))
    return {"rms": rms, "max": max(gaps), "tokens": len(gaps)}


def one_scheduler(client: Client) -> dict[str, Any]:
    (status,) = client.schedulers()
    return status


def calls_of(client: Client, arm: str) -> int:
    client.calls()  # at rest
    return one_scheduler(client)["calls"].get(OPS[arm], {}).get("triton", 0)


@pytest.mark.parametrize("arm", OPS)
def test_hook_is_live_and_called(servers: dict[str, Client], arm: str, record_property) -> None:
    client = servers[arm]
    before = calls_of(client, arm)
    client.generate(prompt(300))
    assert calls_of(client, arm) - before == LAYERS
    status = one_scheduler(client)
    assert status["state"] == "installed"
    assert status["on_hot_path"]
    assert all(hook["live"] for hook in status["hooks"])
    assert status["fallbacks"] == {}
    assert not any(counts.get("torch", 0) for counts in status["calls"].values())
    assert status["check"]["done"] >= LAYERS
    assert status["check"]["disagreements"] == 0
    assert max(status["check"]["worst"].values()) > 0
    checked = status["self_check_full" if arm == "full" else "self_check"]
    assert 0 < checked["worst_ratio"] <= 1
    line = [x for x in client.log().splitlines() if SAID[arm] in x]
    assert len(line) == 1
    record_property("status", status)
    record_property("log_line", line[0])


def test_stock_is_stock(servers: dict[str, Client]) -> None:
    assert not any(servers["stock"].calls().values())


def test_prompt_logprobs(logprobs: dict, record_property) -> None:
    """At most 1.2 times as far from transformers in float32 as stock is; the broken arm is not."""
    truth = [true_prompt_logprobs(prompt(n)) for n in LENGTHS]
    error = {name: distance(found, truth) for name, found in logprobs.items()}
    record_property("against_transformers", error)
    allowed = 1.2 * error["stock"]["rms"]
    assert allowed < error["zero_u"]["rms"]
    for arm in OPS:
        record_property(f"{arm}_against_stock", distance(logprobs[arm], logprobs["stock"]))
        assert 0 < error[arm]["rms"] <= allowed
        assert logprobs[arm] != logprobs["stock"]


def test_stock_repeats_itself(servers: dict[str, Client], logprobs: dict, record_property) -> None:
    servers["stock"].flush()
    again = [servers["stock"].prompt_logprobs(prompt(n)) for n in LENGTHS]
    record_property("stock_against_stock", distance(again, logprobs["stock"]))
    for arm in OPS:
        servers[arm].flush()
        again = [servers[arm].prompt_logprobs(prompt(n)) for n in LENGTHS]
        found = distance(again, logprobs[arm])
        record_property(f"{arm}_against_itself", found)
        assert found["max"] == 0


def test_prefix_cache_hits(servers: dict[str, Client], record_property) -> None:
    """Continued prompts are as near to transformers as stock's, from states kept in the cache."""
    pairs = [(prompt(900 + 16 * i), prompt(100 + 7 * i)) for i in range(CONTINUED)]
    truth = [true_prompt_logprobs(ids + more)[len(ids) :] for ids, more in pairs]
    errors = {}
    for name in ("stock", *OPS):
        client = servers[name]
        client.flush()
        found = []
        for ids, more in pairs:
            client.generate(ids)
            cached, logprobs = client.continued_logprobs(ids, more)
            assert 0 < cached <= len(ids)
            found.append(logprobs)
        errors[name] = distance(found, truth)
    record_property("against_transformers", errors)
    for arm in OPS:
        assert errors[arm]["rms"] <= 1.2 * errors["stock"]["rms"]


def test_many_prompts_at_once(servers: dict[str, Client], record_property) -> None:
    """Mixed lengths in one batch, cut into chunks: as near to transformers as stock's."""
    lengths = (1, 17, 64, 65, 300, 1000, 2049, 5000)
    truth = [true_prompt_logprobs(prompt(n)) for n in lengths]
    errors = {}
    for name in ("stock", *OPS):
        servers[name].flush()
        with ThreadPoolExecutor(len(lengths)) as pool:
            found = list(pool.map(lambda n, c=servers[name]: c.prompt_logprobs(prompt(n)), lengths))
        errors[name] = distance(found, truth)
    record_property("against_transformers", errors)
    for arm in OPS:
        assert errors[arm]["rms"] <= 1.2 * errors["stock"]["rms"]


def test_chat_completions_stream(servers: dict[str, Client], record_property) -> None:
    client = OpenAI(base_url=f"{servers['ours'].server.config.url}/v1", api_key="none")
    messages = [{"role": "user", "content": "Say something."}]
    plain = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=16, extra_body={"ignore_eos": True}
    )
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=16, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    usage = [chunk.usage for chunk in stream if chunk.usage][-1]
    assert usage.completion_tokens == plain.usage.completion_tokens == 16
    record_property("prompt_tokens", usage.prompt_tokens)


def test_health_after_all(servers: dict[str, Client]) -> None:
    for client in servers.values():
        client.server.check_alive()
        assert health.ready(client.server.config.url)
