"""What clients ask of a server, with compiled kernels: tools, schemas, echo, long and many prompts.

A server with the plugin, once with the step around the inverse and once with the whole prefill
replaced, CUDA graphs and the prefix cache on, in strict mode: a call that falls back would end it.
Each server needs the GPU for itself. ``TRINV_LOAD_SECONDS`` sets how long the load lasts (default:
120).
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI

from sglang_trinv.serve import health
from sglang_trinv.serve.tiny_model import make
from tests.e2e.client import Client, body_of
from tests.gpu.servers import Arm, running
from tests.gpu.test_server import prompt

pytestmark = pytest.mark.gpu

LOAD_SECONDS = float(os.environ.get("TRINV_LOAD_SECONDS", "120"))
AT_ONCE, LONGEST = 200, 8000
# In this mode a result does not depend on what else is in the batch: prompts are cut only at
# multiples of 4096 tokens (SGLANG_TRITON_PREFILL_TRUNCATION_ALIGN_SIZE), which a chunk must hold.
DETERMINISTIC = ("--enable-deterministic-inference", "--chunked-prefill-size", "8192")
MANY = (
    "--tool-call-parser", "qwen25", "--cuda-graph-max-bs-decode", "64",
    "--max-running-requests", str(AT_ONCE), "--constrained-json-disable-any-whitespace",
)  # fmt: skip


@pytest.fixture(scope="module", params=["intra", "full"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    model = tmp_path_factory.mktemp("model")
    make.write(model, "conditional")
    environ = {"SGLANG_TRINV_STRICT": "1", "SGLANG_TRINV_GDN": request.param}
    arms = {"ours": Arm(environ, (*DETERMINISTIC, *MANY))}
    with running(model, arms, tmp_path_factory.mktemp("runs")) as clients:
        yield clients["ours"]


@pytest.fixture(scope="module")
def openai(server: Client) -> OpenAI:
    return OpenAI(base_url=f"{server.server.config.url}/v1", api_key="none", timeout=120)


def test_self_check_of_the_compiled_kernels(server: Client, record_property) -> None:
    (status,) = server.schedulers()
    assert 0 < status["self_check"]["worst_ratio"] <= 1
    record_property("self_check", status["self_check"])
    record_property("self_check_full", status["self_check_full"])
    record_property("warmup_s", status["warmup_s"])


def test_json_schema(openai: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "size": {"enum": [1, 2, 3]}},
        "required": ["color", "size"],
        "additionalProperties": False,
    }
    answer = openai.chat.completions.create(
        model="tiny", max_tokens=64, temperature=0,
        messages=[{"role": "user", "content": "Choose."}],
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
    )  # fmt: skip
    found = json.loads(answer.choices[0].message.content)
    assert found["color"] in ("red", "blue")
    assert found["size"] in (1, 2, 3)


def test_tool_call(openai: OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    function = {"name": "weather", "parameters": parameters, "strict": True}
    tool = {"type": "function", "function": function}
    answer = openai.chat.completions.create(
        model="tiny", max_tokens=128, temperature=0, tools=[tool], tool_choice="required",
        messages=[{"role": "user", "content": "How is the weather in Rome?"}],
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_echo_with_logprobs(openai: OpenAI) -> None:
    text = "The quick brown fox"
    answer = openai.completions.create(
        model="tiny", prompt=text, max_tokens=2, echo=True, logprobs=1, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text.startswith(text)
    values = choice.logprobs.token_logprobs
    assert len(values) == len(text) + answer.usage.completion_tokens
    assert all(value is None or value <= 0 for value in values)


def test_streamed_chat(openai: OpenAI) -> None:
    stream = openai.chat.completions.create(
        model="tiny", max_tokens=24, stream=True, stream_options={"include_usage": True},
        messages=[{"role": "user", "content": "Say something."}],
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    chunks = list(stream)
    assert sum(bool(chunk.choices) for chunk in chunks) > 2
    assert chunks[-1].usage.completion_tokens == 24


def test_batch_of_mixed_lengths(server: Client, record_property) -> None:
    """In one batch and alone, the same log probabilities, bit for bit."""
    lengths = (1, 63, 64, 65, 500, 4097, 16000, 32000)
    server.flush()
    alone = [server.prompt_logprobs(prompt(n)) for n in lengths]
    server.flush()
    with ThreadPoolExecutor(len(lengths)) as pool:
        together = list(pool.map(lambda n: server.prompt_logprobs(prompt(n)), lengths))
    assert [len(found) for found in together] == [n - 1 for n in lengths]
    gaps = [
        abs(a - b) for x, y in zip(alone, together, strict=True) for a, b in zip(x, y, strict=True)
    ]
    record_property("largest_gap", max(gaps))
    assert max(gaps) == 0


def test_prefix_cache_hit(server: Client) -> None:
    ids = prompt(3000)
    server.flush()
    server.generate(ids)
    hit, logprobs = server.next_logprobs(ids + prompt(200))
    assert 0 < hit <= len(ids)
    server.flush()
    fresh, expected = server.next_logprobs(ids + prompt(200))
    assert fresh == 0
    assert logprobs.keys() == expected.keys()


def test_load(server: Client, record_property) -> None:
    """200 at once for two minutes: every answer is there once, and equals the one served alone."""
    source = random.Random(0)
    prompts = [prompt(source.randint(1, LONGEST)) for _ in range(AT_ONCE)]
    answers: list[tuple[int, str, dict]] = []
    end = time.monotonic() + LOAD_SECONDS
    lock = threading.Lock()

    def client(i: int) -> None:
        while time.monotonic() < end:
            rid = uuid.uuid4().hex
            with lock:
                which = source.randrange(AT_ONCE)
            found = health.post(server.server.config, "/generate", body_of(prompts[which], rid))
            with lock:
                answers.append((which, rid, found["meta_info"]))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for each in [pool.submit(client, i) for i in range(AT_ONCE)]:
            each.result()
    record_property("requests", len(answers))
    assert len(answers) >= AT_ONCE
    assert all(meta["id"] == rid for _, rid, meta in answers)
    server.flush()
    checked = {}
    for which, _, meta in answers:
        if meta["cached_tokens"] == 0:
            checked.setdefault(which, [value for value, _, _ in meta["input_token_logprobs"][1:]])
    assert len(checked) > AT_ONCE // 4
    for which in list(checked)[:40]:
        server.flush()
        assert server.prompt_logprobs(prompts[which]) == checked[which]
    (status,) = server.schedulers()
    assert status["fallbacks"] == {}
    assert all(hook["live"] for hook in status["hooks"])
