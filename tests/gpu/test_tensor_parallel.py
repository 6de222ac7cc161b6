"""Tensor parallelism on two GPUs: the same log probabilities as on one, every rank ours.

The embedded model has one key head; served here is the same function with two of everything.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests import doubled
from tests.e2e.client import Client, true_prompt_logprobs
from tests.gpu.servers import Arm, running
from tests.gpu.test_server import LENGTHS, OPS, distance, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
CHECKED = 200
# NCCL alone adds up: with FlashInfer's fused all-reduce stock was not ready after five minutes.
TWO = (
    "--tp-size", "2", "--enforce-disable-flashinfer-allreduce-fusion",
    "--disable-custom-all-reduce",
)  # fmt: skip


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, int], Client]]:
    """(arm, number of GPUs) -> server, for SGLang's own kernels and the whole prefill of ours."""
    model = doubled.write(tmp_path_factory.mktemp("model"))
    ours = {
        "SGLANG_TRINV_STRICT": "1", "SGLANG_TRINV_GDN": "full", "SGLANG_TRINV_CHECK": str(CHECKED),
    }  # fmt: skip
    arms = {
        (name, size): Arm(environ, flags)
        for name, environ in (("stock", None), ("full", ours))
        for size, flags in ((1, ()), (2, TWO))
    }
    with running(model, arms, tmp_path_factory.mktemp("runs")) as clients:
        yield clients


def test_logprobs_are_those_of_one_gpu(servers, record_property) -> None:
    """As near to transformers as stock on as many GPUs, and to each other as stock's are."""
    truth = [true_prompt_logprobs(prompt(n)) for n in LENGTHS]
    found = {
        key: [client.prompt_logprobs(prompt(n)) for n in LENGTHS] for key, client in servers.items()
    }
    errors = {key: distance(logprobs, truth)["rms"] for key, logprobs in found.items()}
    between = {arm: distance(found[arm, 2], found[arm, 1])["rms"] for arm in ("stock", "full")}
    record_property("against_transformers", {f"{k} on {n}": v for (k, n), v in errors.items()})
    record_property("two_against_one", between)
    for size in (1, 2):
        assert errors["full", size] <= 1.2 * errors["stock", size]
    assert between["full"] <= 1.2 * max(between["stock"], errors["stock", 1])


def test_every_rank_answers_by_our_kernels(servers, record_property) -> None:
    client = servers["full", 2]
    client.flush()
    client.generate(prompt(700))
    client.calls()  # at rest
    ranks = client.schedulers()
    record_property("ranks", ranks)
    assert sorted(rank["rank"] for rank in ranks) == [0, 1]
    assert all(rank["world"] == 2 and not rank["mismatch"] for rank in ranks)
    assert all(rank["state"] == "installed" and rank["on_hot_path"] for rank in ranks)
    assert all(hook["live"] for rank in ranks for hook in rank["hooks"])
    counts = [rank["calls"][OPS["full"]]["triton"] for rank in ranks]
    assert counts[0] == counts[1] > 0
    assert all(rank["fallbacks"] == {} and not rank["check"]["disagreements"] for rank in ranks)
