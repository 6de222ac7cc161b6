"""The embedded model with another inverse: its keys and gates, and how much error it tolerates.

transformers runs the model in float32 on the CPU; only the chunk rule of the linear attention is
replaced, by the float64 reference with one method's inverse. No server and no kernel take part.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sglang_trinv.evals.tasks import generators, sources
from sglang_trinv.reference.chunk import CHUNK_SIZE, inverse, naive_chunk_forward
from sglang_trinv.reference.faults import INVERSES
from sglang_trinv.reference.inputs import Inputs
from sglang_trinv.reference.methods import METHODS, invert
from sglang_trinv.reference.recurrence import l2norm
from sglang_trinv.serve import tiny_model

CAPTURED = 256  # tokens: two chunks of 128
SEED = "study"
Solve = Callable[[Tensor], Tensor]
Row = dict[str, Any]


@dataclass
class Documents:
    """Token ids, padded at the end; the last real token is the answer of a question, or text."""

    ids: Tensor  # int64 [documents, tokens]
    lengths: Tensor  # int64 [documents]
    asked: Tensor  # bool [documents]


def documents(number: int) -> Documents:
    """``number`` questions that need the delta rule, and a quarter as many texts.

    From the generators of the evaluation under a seed name of their own.
    """
    r = random.Random(SEED)
    kinds = (
        partial(generators.overwrite, r, "one", 5, 60),
        partial(generators.overwrite, r, "two", 12, 60),
        partial(generators.correlated, r, 6, 40),
        partial(generators.boundary, r, 40, 180),
    )
    texts = ["".join(kinds[i % len(kinds)]()) for i in range(number)]
    corpus = sources.corpus(held_out=True)
    plain = [generators.dense(r, "four", 6, CAPTURED).text for _ in range(number // 8)]
    plain += [sources.excerpt(r, corpus, CAPTURED) for _ in range(number // 8)]
    tokens = [list(text.encode()) for text in texts + plain]
    longest = max(map(len, tokens))
    ids = torch.tensor([t + [0] * (longest - len(t)) for t in tokens])
    return Documents(ids, torch.tensor([len(t) for t in tokens]),
                     torch.tensor([True] * len(texts) + [False] * len(plain)))  # fmt: skip


class Model:
    """The embedded model in transformers, with a chunk rule that can be looked into."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()  # that there is no fast path is known
        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(tiny_model.PATH, dtype=torch.float32)
        self.model = model.eval()
        self.layers = [m for m in model.modules() if hasattr(m, "chunk_gated_delta_rule")]

    @torch.no_grad()
    def log_probabilities(self, ids: Tensor, rule: Callable[..., Any]) -> Tensor:
        """Of every next token, float64 [documents, tokens - 1, vocabulary]."""
        for layer in self.layers:
            layer.chunk_gated_delta_rule = partial(rule, layer)
        logits = self.model(ids, use_cache=False).logits
        return logits[:, :-1].double().log_softmax(-1)


def chunk_rule(solve: Solve, layer: Any, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> tuple:
    """transformers' torch_chunk_gated_delta_rule in float64 with this inverse; no state is kept."""
    if rest.get("use_qk_l2norm_in_kernel"):
        q, k = l2norm(q), l2norm(k)
    o, _ = naive_chunk_forward(q, k, v, rest["g"], rest["beta"], solve=solve)
    return o.to(v.dtype), None


def capture(model: Model) -> list[tuple[str, Inputs]]:
    """What the linear attention layers get: plain text, and keys that resemble each other."""
    r = random.Random(f"{SEED}-capture")
    text = sources.excerpt(r, sources.corpus(held_out=True), 4 * CAPTURED).ljust(CAPTURED)
    alike = generators.dense(r, "four", 6, CAPTURED).text.ljust(CAPTURED)
    found: list[tuple[str, Inputs]] = []

    def record(name: str, layer: Any, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> tuple:
        x = Inputs(l2norm(q), l2norm(k), v, rest["g"].float(), rest["beta"].float())
        found.append((f"{name}, layer {model.layers.index(layer)}", x))
        return chunk_rule(inverse, layer, q, k, v, **rest)

    for name, document in (("text", text), ("keys alike", alike)):
        ids = torch.tensor([list(document[:CAPTURED].encode())])
        model.log_probabilities(ids, partial(record, name))
    return found


def candidates(quick: bool) -> Iterator[tuple[str, str, Solve]]:
    """(method, precision, inverse) of what the model is run with."""
    for name, fault in INVERSES.items():
        if not quick or name == "last_merge":
            yield f"fault {name}", "", lambda A, fault=fault: fault(A.float())
    pairs = [(method, p) for p in ("fp16", "bf16") for method in METHODS]
    pairs += [(method, "fp32") for method in ("MBH16", "MXR16", "MCH", "NS6", "FS16")]
    for method, precision in (("MBH16", "fp16"), ("MXR16", "fp16")) if quick else pairs:
        yield method, precision, partial(invert, method=method, precision=precision)


def drift(model: Model, quick: bool) -> Iterator[Row]:
    """For each inverse: its error on the model's own chunks, and what the answers become.

    ``inverse``: relative Frobenius error, the worst chunk and its mean. ``logprob``: mean change of
    a true token's log-probability, ``logprob_max`` the largest. ``kl``: mean divergence from the
    exact model. ``accuracy``: share of the questions answered rightly.
    """
    docs = documents(8 if quick else 24)
    exact = model.log_probabilities(docs.ids, partial(chunk_rule, inverse))
    for method, precision, solve in (("exact", "fp64", inverse), *candidates(quick)):
        seen: list[Tensor] = []

        def watched(A: Tensor, solve: Solve = solve, seen: list[Tensor] = seen) -> Tensor:
            X, truth = solve(A).double(), inverse(A)
            seen.append(torch.linalg.matrix_norm(X - truth) / torch.linalg.matrix_norm(truth))
            return X

        found = model.log_probabilities(docs.ids, partial(chunk_rule, watched))
        error = torch.cat([e.flatten() for e in seen]).nan_to_num(nan=torch.inf, posinf=torch.inf)
        yield {
            "method": method,
            "precision": precision,
            "n": CHUNK_SIZE,
            "inverse": error.max().item(),
            "inverse_mean": error.mean().item(),
            **compare(docs, exact, found),
        }


def compare(docs: Documents, exact: Tensor, found: Tensor) -> dict[str, float]:
    """The model's part of ``drift``'s row."""
    real = torch.arange(docs.ids.shape[1] - 1) < docs.lengths[:, None] - 1
    target = docs.ids[:, 1:, None]
    change = (found.gather(2, target) - exact.gather(2, target))[..., 0].abs()[real]
    kl = (exact.exp() * (exact - found)).sum(-1)[real]
    last = docs.lengths - 2
    rows = torch.arange(len(last))
    right = found[rows, last].argmax(-1) == docs.ids[rows, last + 1]
    right &= found[rows, last].isfinite().all(-1)
    change, kl = (x.nan_to_num(nan=torch.inf, posinf=torch.inf) for x in (change, kl))
    return {
        "logprob": change.mean().item(),
        "logprob_max": change.max().item(),
        "kl": kl.mean().item(),
        "accuracy": right[docs.asked].double().mean().item(),
    }
