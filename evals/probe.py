"""Next-token distributions and greedy continuations of a server, and how two servers differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang_trinv.evals.errors import EvalError

TOP = 20
TIMEOUT_S = 900.0
LEAD = 1.0  # nats: a greedy token with this lead over the next does not change by rounding
Ask = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Probe:
    """Answers to the probe's documents; position arrays of all documents lie end to end.

    Shapes: ``document``, ``position``, ``chosen`` [N]; ``ids``, ``logprobs`` [N, TOP], best first;
    ``greedy`` [documents, new tokens], -1 after the end; ``cached`` [documents].
    """

    document: np.ndarray
    position: np.ndarray
    chosen: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    greedy: np.ndarray
    cached: np.ndarray

    def save(self, path: Path) -> None:
        np.savez_compressed(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> Probe:
        """Raises EvalError if there is none."""
        try:
            with np.load(path) as arrays:
                return cls(**{name: arrays[name] for name in arrays.files})
        except (OSError, ValueError, TypeError) as error:
            raise EvalError(f"{path} cannot be read: {error}") from None


def choose(texts: Sequence[str], number: int, most_characters: int) -> list[str]:
    """``number`` texts, evenly over those that are short enough."""
    short = list(dict.fromkeys(text for text in texts if 1 < len(text) <= most_characters))
    if len(short) <= number:
        return short
    return [short[i * len(short) // number] for i in range(number)]


def run(
    ask: Ask, texts: Sequence[str], new_tokens: int, prefix_cache: bool, concurrency: int
) -> Probe:
    """Ask ``/generate`` for every text.

    Args:
        ask: sends a body to /generate and returns the answer.
        prefix_cache: ask three quarters of the text first, then all of it, so that a cached state
            is continued; the distribution is then that of the next token alone.
    """

    def one(text: str) -> dict[str, Any]:
        sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        body: dict[str, Any] = {"text": text, "return_logprob": True, "top_logprobs_num": TOP}
        if prefix_cache:
            first = {"max_new_tokens": 1, "temperature": 0}
            ask({"text": text[: len(text) * 3 // 4], "sampling_params": first})
        else:
            body["logprob_start_len"] = 0
        return ask({**body, "sampling_params": sampling})["meta_info"]

    with ThreadPoolExecutor(concurrency) as pool:
        return collect(list(pool.map(one, texts)), new_tokens)


def collect(answers: Sequence[dict[str, Any]], new_tokens: int) -> Probe:
    """Answers' ``meta_info`` as arrays."""
    documents, positions, chosen, ids, logprobs = [], [], [], [], []
    greedy = np.full((len(answers), new_tokens), -1, np.int32)
    for number, meta in enumerate(answers):
        output = meta["output_token_logprobs"]
        tokens = [token for _, token, _ in output][:new_tokens]
        greedy[number, : len(tokens)] = tokens
        prompt = list(zip(meta.get("input_token_logprobs") or [],
                          meta.get("input_top_logprobs") or [], strict=False))  # fmt: skip
        last = (output[0], meta["output_top_logprobs"][0])
        for at, (token, top) in enumerate([*prompt, last]):
            if not top:  # the first token of a prompt has no distribution
                continue
            documents.append(number)
            positions.append(at)
            chosen.append(np.nan if token[0] is None else token[0])
            if any(value is None for value, _, _ in top):  # JSON has no NaN
                raise EvalError("a log probability of the probe is not a number")
            best = sorted(((value, name) for value, name, _ in top), reverse=True)[:TOP]
            best += [(-np.inf, -1)] * (TOP - len(best))
            ids.append([name for _, name in best])
            logprobs.append([value for value, _ in best])
    cached = [int(meta.get("cached_tokens") or 0) for meta in answers]
    return Probe(
        np.array(documents, np.int32), np.array(positions, np.int32), np.array(chosen, np.float32),
        np.array(ids, np.int32).reshape(-1, TOP), np.array(logprobs, np.float32).reshape(-1, TOP),
        greedy, np.array(cached, np.int32),
    )  # fmt: skip


def check_same(off: Probe, on: Probe) -> None:
    """Raise EvalError unless both were asked the same tokens and every answer is finite."""
    if not (np.array_equal(off.document, on.document) and np.array_equal(off.position, on.position)
            and off.greedy.shape == on.greedy.shape):  # fmt: skip
        raise EvalError("the probes of the two arms have different documents")
    for probe in (off, on):
        if not np.isfinite(probe.logprobs[:, 0]).all() or np.isnan(probe.logprobs).any():
            raise EvalError("a probe's log probability is not finite")


def divergence(off: Probe, on: Probe) -> np.ndarray:
    """KL(off || on) of every position, nats [N].

    Over off's likeliest tokens that on lists too, all others as one event: at most the divergence
    of the whole distributions, and close to it, since TOP tokens hold nearly all of them.
    """
    from scipy.special import rel_entr

    same = (off.ids[:, :, None] == on.ids[:, None, :]) & (off.ids[:, :, None] >= 0)
    listed = same.any(2)
    p = np.where(listed, np.exp(off.logprobs.astype(float)), 0.0)
    match = np.take_along_axis(on.logprobs.astype(float), same.argmax(2), 1)
    q = np.where(listed, np.exp(match), 0.0)
    rest_p, rest_q = (np.clip(1 - x.sum(1), 1e-9, 1) for x in (p, q))
    each = rel_entr(p, np.where(listed, np.maximum(q, 1e-30), 1.0)).sum(1)
    return np.maximum(each + rel_entr(rest_p, rest_q), 0.0)


def decided_changes(off: Probe, on: Probe) -> tuple[int, int]:
    """How many likeliest tokens changed, of those that off leads by ``LEAD`` nats or more."""
    decided = off.logprobs[:, 0] - off.logprobs[:, 1] >= LEAD
    return int((decided & (off.ids[:, 0] != on.ids[:, 0])).sum()), int(decided.sum())


def agreement(off: Probe, on: Probe) -> np.ndarray:
    """Number of greedy tokens, from the first one on, that are the same [documents]."""
    return np.cumprod(off.greedy == on.greedy, axis=1).sum(1)


def by_row(off: Probe, on: Probe, chunk: int = 64) -> np.ndarray:
    """Mean |difference of the log probability| of prompt tokens by position mod ``chunk``; NaN
    where there is none."""
    gap = np.abs(off.chosen.astype(float) - on.chosen)
    row = (off.position - 1) % chunk  # the token before it was predicted from
    known = np.isfinite(gap)
    total = np.bincount(row[known], gap[known], chunk)
    count = np.bincount(row[known], minlength=chunk)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
