"""What the tests ask a server, and the truth that the answers are measured against."""

from __future__ import annotations

import functools
import math
import random
import time
from dataclasses import dataclass
from typing import Any

import torch

from sglang_trinv.serve import health, tiny_model
from sglang_trinv.serve.config import ServeError
from sglang_trinv.serve.launch import Server

# Around the chunk of the kernels (64), and more than two prefill chunks of the server (96)
LENGTHS = (1, 17, 64, 65, 200)
TOP = 20
SETTLE_S = 15.0


def prompt(length: int, seed: int = 0) -> list[int]:
    """``length`` bytes of text-like noise; every seed starts differently, so no cache hits."""
    source = random.Random(f"{length} {seed}")
    letters = b"etaoin shrdlu cmfwyp vbgkjqxz.,;ETAOIN0123456789\n"
    return [source.choice(letters) for _ in range(length)]


def body_of(ids: list[int], rid: str, **sampling: Any) -> dict[str, Any]:
    """A ``/generate`` request that is told apart by ``rid`` and gives its prompt's logprobs."""
    sampling = {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True, **sampling}
    return {
        "input_ids": ids, "rid": rid, "sampling_params": sampling,
        "return_logprob": True, "logprob_start_len": 0,
    }  # fmt: skip


@dataclass
class Client:
    """A server as the tests see it."""

    server: Server

    def generate(self, ids: list[int], **more: Any) -> dict[str, Any]:
        """``/generate`` of one token."""
        sampling = {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling, **more}
        return health.post(self.server.config, "/generate", body)

    def prompt_logprobs(self, ids: list[int]) -> list[float]:
        """Log probability of every prompt token but the first; no part comes from the cache."""
        meta = self.generate(ids, return_logprob=True, logprob_start_len=0)["meta_info"]
        assert meta["cached_tokens"] == 0
        return [value for value, _, _ in meta["input_token_logprobs"][1:]]

    def next_logprobs(self, ids: list[int]) -> tuple[int, dict[int, float]]:
        """Number of cached tokens, and the log probabilities of the likeliest next tokens."""
        meta = self.generate(ids, return_logprob=True, top_logprobs_num=TOP)["meta_info"]
        return meta["cached_tokens"], {t: value for value, t, _ in meta["output_top_logprobs"][0]}

    def continued_logprobs(self, ids: list[int], more: list[int]) -> tuple[int, list[float]]:
        """Number of cached tokens of ``ids``, and the log probability of each of ``more[1:]``."""
        options = {"return_logprob": True, "logprob_start_len": len(ids)}
        meta = self.generate(ids + more, **options)["meta_info"]
        values = [value for value, _, _ in meta["input_token_logprobs"][1 - len(more) :]]
        return meta["cached_tokens"], values

    def flush(self) -> None:
        """Empty the prefix cache; the scheduler refuses until it has put away the last batch."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            try:
                health.post(self.server.config, "/flush_cache")
                return
            except ServeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def schedulers(self) -> list[dict[str, Any]]:
        """Status of the scheduler processes, without where its file lies."""
        found = health.schedulers(self.server.run_dir)
        return [{key: value for key, value in s.items() if key != "file"} for s in found]

    def calls(self) -> dict[str, int]:
        """Calls by implementation, once the counts have come to rest."""
        before, deadline = None, time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            now = {n: health.calls(self.schedulers(), n) for n in ("triton", "torch", INTERPRETER)}
            if now == before:
                return now
            before = now
            time.sleep(2.5)  # a status file is written at most once a second
        raise AssertionError(f"the counts of calls do not come to rest: {before}")

    def log(self) -> str:
        """The server's log."""
        return self.server.log.read_text(errors="replace")


INTERPRETER = "triton-interpreter"


@functools.cache
def reference() -> torch.nn.Module:
    """The same weights in transformers, float32, its own torch code; on a GPU if there is one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model.PATH, dtype=torch.float32).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def true_prompt_logprobs(ids: list[int]) -> list[float]:
    """What ``Client.prompt_logprobs`` should be."""
    tokens = torch.tensor([ids], device=reference().device)
    logprobs = reference()(tokens).logits[0, :-1].double().log_softmax(-1)
    return logprobs.gather(1, tokens[0, 1:, None])[:, 0].tolist()


def rms(x: list[float], y: list[float]) -> float:
    """Root mean square difference; NaN if anything is not a number."""
    assert len(x) == len(y)
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x)) if x else 0.0


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]
