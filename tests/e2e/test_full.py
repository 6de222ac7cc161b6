"""The real server with SGLANG_TRINV_GDN=full: the whole prefill is ours."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from sglang_trinv.serve.health import IMPLEMENTATION
from sglang_trinv.serve.launch import Server
from tests.e2e.client import Client, flat, prompt, rms
from tests.e2e.conftest import CHECKED, CHUNK, PROMPTS, MakeServer, started

LAYERS = 3
OP = "chunk_gated_delta_rule"


@pytest.fixture(scope="module")
def full(make_server: MakeServer) -> Server:
    strict = {"SGLANG_TRINV_STRICT": "1", "SGLANG_TRINV_CHECK": str(CHECKED)}
    return started(make_server("full", SGLANG_TRINV_GDN="full", **strict))


def calls(client: Client) -> int:
    client.calls()  # at rest
    (status,) = client.schedulers()
    assert status["fallbacks"] == {}
    return status["calls"].get(OP, {}).get(IMPLEMENTATION[client.server.config.device], 0)


def test_it_is_installed_and_answers_every_prefill(full: Server) -> None:
    client = Client(full)
    (status,) = client.schedulers()
    assert status["on_hot_path"]
    assert all(hook["live"] for hook in status["hooks"])
    assert 0 < status["self_check_full"]["worst_ratio"] <= 1
    before = calls(client)
    client.generate(prompt(CHUNK + 1, seed=1))
    assert calls(client) - before == 2 * LAYERS
    (status,) = client.schedulers()
    assert not any(status["calls"]["fwd_intra"].values())  # also not by checks of SGLang's chain


def test_the_first_calls_agree_with_sglangs_chain(full: Server) -> None:
    client = Client(full)
    client.generate(prompt(70, seed=3))
    (status,) = client.schedulers()
    checked = status["check"]
    assert checked["done"] >= LAYERS
    assert (checked["disagreements"], checked["skipped"]) == (0, 0)
    assert 0 < checked["worst_error"]["ours"]["o"] < 0.05
    assert 0 < checked["worst"]["state"] < 0.05


def test_prompt_logprobs(full: Server, truth, of_stock, tolerance) -> None:
    found = [Client(full).prompt_logprobs(ids) for ids in PROMPTS]
    assert rms(flat(found), flat(truth)) <= tolerance
    assert 0 < rms(flat(found), flat(of_stock)) <= 2 * tolerance


def test_prompts_prefilled_together(full: Server, tolerance) -> None:
    prompts = [prompt(length, seed=2) for length in (10, 70, 33, 100)]
    client = Client(full)
    alone = [client.prompt_logprobs(ids) for ids in prompts]
    client.flush()
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(client.prompt_logprobs, prompts))
    assert rms(flat(together), flat(alone)) <= tolerance


def test_a_prefix_hit_continues_from_the_tracked_state(full: Server) -> None:
    client, ids = Client(full), prompt(200, seed=4)
    client.flush()
    cold = client.next_logprobs(ids)
    hit = client.next_logprobs(ids)
    assert cold[0] == 0
    assert hit[0] > 0
    assert max(abs(hit[1][t] - cold[1][t]) for t in hit[1].keys() & cold[1].keys()) < 0.1
