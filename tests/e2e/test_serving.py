"""The real server: our kernels against SGLang's, and both against transformers in float32."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI

from sglang_trinv.serve.health import IMPLEMENTATION
from tests.e2e.client import LENGTHS, Client, flat, prompt, rms, true_prompt_logprobs
from tests.e2e.conftest import CHECKED, CHUNK, PROMPTS, SLACK

LAYERS = 3
CONCURRENT = (10, 70, 33, 100)


@pytest.fixture(scope="module")
def of_ours(ask_ours):
    return [ask_ours.prompt_logprobs(ids) for ids in PROMPTS]


def test_hook_is_live_in_the_scheduler(ask_ours):
    (status,) = ask_ours.schedulers()
    assert status["state"] == "installed"
    assert status["layers"]["gdn"] == LAYERS
    assert status["prefill_backend"] == "triton"
    assert status["on_hot_path"]
    assert status["hooks"]
    assert all(hook["live"] for hook in status["hooks"])
    line = [line for line in ask_ours.log().splitlines() if "GDN intra-chunk inverse" in line]
    assert len(line) == 1


@pytest.mark.parametrize("length", [5, CHUNK, CHUNK + 1])
def test_one_call_a_layer_and_prefill_chunk(ask_ours, length):
    implementation = IMPLEMENTATION[ask_ours.server.config.device]
    before = ask_ours.calls()
    ask_ours.generate(prompt(length, seed=1))
    after = ask_ours.calls()
    assert after[implementation] - before[implementation] == LAYERS * -(-length // CHUNK)
    assert after["torch"] == 0
    assert all(status["fallbacks"] == {} for status in ask_ours.schedulers())


def test_stock_arm_never_calls_us(ask_stock, of_stock):
    assert not any(ask_stock.calls().values())
    assert "GDN intra-chunk inverse" not in ask_stock.log()


def test_prompt_logprobs(of_ours, truth, tolerance):
    found = rms(flat(of_ours), flat(truth))
    assert found <= tolerance


def test_prompt_logprobs_differ_from_stock_by_rounding_alone(of_ours, of_stock, tolerance):
    """Two roundings of the same numbers are at most both distances apart, and not the same."""
    distance = rms(flat(of_ours), flat(of_stock))
    assert 0 < distance <= 2 * tolerance


def test_long_prompts_were_prefilled_in_chunks(ask_ours, of_ours):
    tokens = [int(n) for n in re.findall(r"Prefill batch.*?#new-token: (\d+)", ask_ours.log())]
    assert max(tokens) == CHUNK
    assert max(LENGTHS) > 2 * CHUNK


def test_first_calls_agree_with_stock_in_process(ask_ours, of_ours):
    (status,) = ask_ours.schedulers()
    check = status["check"]
    assert check["done"] == CHECKED
    assert check["disagreements"] == 0
    assert 0 < max(check["worst"].values()) < 0.02


def test_prefix_cache_hit(ask_ours, ask_stock):
    """The state of a cached prefix goes on into the next prefill."""
    ids, more = prompt(70, seed=2), prompt(20, seed=3)
    truth = true_prompt_logprobs(ids + more)[len(ids) :]
    errors = {}
    for name, client in (("ours", ask_ours), ("stock", ask_stock)):
        fresh, logprobs = client.continued_logprobs(ids, more)
        assert fresh == 0
        alone = rms(logprobs, truth)
        client.flush()
        client.generate(ids)
        hit, logprobs = client.continued_logprobs(ids, more)
        assert 0 < hit <= len(ids)
        errors[name] = max(alone, rms(logprobs, truth))
    assert errors["ours"] <= SLACK * errors["stock"] + 1e-3


def test_four_prompts_at_once(ask_ours, tolerance):
    prompts = [prompt(length, seed=4) for length in CONCURRENT]
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(ask_ours.prompt_logprobs, prompts))
    truth = [true_prompt_logprobs(ids) for ids in prompts]
    assert rms(flat(found), flat(truth)) <= tolerance
    batches = [int(n) for n in re.findall(r"Prefill batch.*?#new-seq: (\d+)", ask_ours.log())]
    assert max(batches) > 1


def openai(client: Client) -> OpenAI:
    return OpenAI(base_url=f"{client.server.config.url}/v1", api_key="none", timeout=300)


def test_chat(ask_ours):
    messages = [{"role": "user", "content": "How long is a chunk?"}]
    answer = openai(ask_ours).chat.completions.create(
        model="tiny", messages=messages, max_tokens=6, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens == len(
        b"<user\nHow long is a chunk?>\n<assistant\n"
    )  # a special token is one token
    assert answer.choices[0].finish_reason == "length"


def test_streaming_chat(ask_ours):
    messages = [{"role": "user", "content": "Stream."}]
    stream = openai(ask_ours).chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage.completion_tokens == 8
    assert sum(bool(chunk.choices) for chunk in chunks) > 2


def test_negative_control(zero_u, tolerance):
    """A broken result changes the log probabilities, and the in-process check sees it."""
    client = Client(zero_u)
    ids = PROMPTS[3]
    assert rms(client.prompt_logprobs(ids), true_prompt_logprobs(ids)) > 2 * tolerance
    (status,) = client.schedulers()
    assert status["check"]["done"] > 0
    assert status["check"]["disagreements"] == status["check"]["done"]
