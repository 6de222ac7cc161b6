"""What trained candidates can do: accuracy on a ladder of levels, bits per byte of other text."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from sglang_trinv.evals.tasks import generators as gen
from sglang_trinv.evals.tasks import sources
from sglang_trinv.evals.training.data import PAD_ID
from sglang_trinv.evals.training.model import CHUNK, Stack

EASY = "overwrite one 5x28"
EASY_FLOOR = 0.95
LONG = 1024  # levels with longer documents are left out of the checks during training
LEVELS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    **{
        f"overwrite {kind} {n}x{writes}": lambda r, k=kind, n=n, w=writes: gen.overwrite(r, k, n, w)
        for kind, n, writes in (
            ("one", 4, 16), ("one", 5, 28), ("one", 8, 28), ("one", 14, 29), ("one", 8, 60),
            ("one", 16, 100), ("one", 26, 200), ("two", 12, 20), ("two", 24, 80), ("two", 48, 160),
            ("two", 96, 300), ("one", 8, 1900), ("one", 16, 1900),
        )
    },
    **{
        f"mqar {kind} {n}": lambda r, k=kind, n=n: gen.mqar(r, k, n)
        for kind, n in (("one", 14), ("one", 26), ("two", 20), ("two", 50), ("two", 100),
                        ("two", 200))
    },
    **{
        f"correlated {n}x{writes}": lambda r, n=n, w=writes: gen.correlated(r, n, w)
        for n, writes in ((3, 11), (5, 24), (8, 48), (14, 98))
    },
    **{
        f"niah {length}": lambda r, length=length: gen.niah(r, 4, length)
        for length in (62, 256, 1000, 4000)
    },
    "boundary 63..129": lambda r: gen.boundary(
        r, r.randrange(8, 60), r.choice((63, 64, 65, 127, 128, 129))
    ),
}  # fmt: skip


def documents(level: str, n: int) -> list[tuple[str, str]]:
    """Seeded documents of a level; no other part of the project draws from this seed name."""
    r = random.Random(f"check-{level}")
    return [LEVELS[level](r) for _ in range(n)]


def check(
    stack: Stack, n: int, most_tokens: int = 32768, long: bool = True
) -> list[dict[str, Any]]:
    """One record a candidate: accuracy of every level, bits per byte of text, and a score.

    The weights are rounded to bfloat16 first, as they will be stored.
    """
    flat = stack.flat.detach().to(torch.bfloat16).float()
    records: list[dict[str, Any]] = [{"accuracy": {}} for _ in range(len(flat))]
    for level in LEVELS:
        docs = documents(level, n)
        if max(len(context) for context, _ in docs) > LONG and not long:
            continue
        for record, right in zip(records, _right(stack, flat, docs, most_tokens), strict=True):
            record["accuracy"][level] = round(right / len(docs), 4)
    for record, bits in zip(records, _bits(stack, flat, n // 4, most_tokens), strict=True):
        record["bits_per_byte"] = round(bits, 4)
        accuracy = record["accuracy"]
        record["score"] = round(sum(accuracy.values()) / len(accuracy) - 0.05 * bits, 4)
        if not accuracy[EASY] >= EASY_FLOOR:
            record["score"] -= 1.0
    return records


def tokens(texts: list[str], device: torch.device) -> torch.Tensor:
    """Byte tokens, padded on the right to whole chunks."""
    width = -(-max(map(len, texts)) // CHUNK) * CHUNK
    rows = [list(text.encode()) + [PAD_ID] * (width - len(text)) for text in texts]
    return torch.tensor(rows, device=device)


def _right(stack: Stack, flat: torch.Tensor, docs: list[tuple[str, str]], most: int) -> list[int]:
    total = torch.zeros(len(flat), dtype=torch.long, device=flat.device)
    step = max(1, most // max(len(context) for context, _ in docs))
    for i in range(0, len(docs), step):
        part = docs[i : i + step]
        x = tokens([context for context, _ in part], flat.device)
        last = torch.tensor([len(context) - 1 for context, _ in part], device=flat.device)
        want = torch.tensor([ord(answer) for _, answer in part], device=flat.device)
        with torch.no_grad():
            logits = stack.forward(x, flat)
        at = logits[:, torch.arange(len(part), device=flat.device), last]
        total += (at.argmax(-1) == want).sum(-1)
    return total.tolist()


def _bits(stack: Stack, flat: torch.Tensor, n: int, most: int) -> list[float]:
    r, texts = random.Random("check-text"), sources.corpus(held_out=True)
    length = 512
    excerpts = [e for e in (sources.excerpt(r, texts, length) for _ in range(4 * max(n, 4)))
                if len(e) == length][: max(n, 4)]  # fmt: skip
    total, step = torch.zeros(len(flat), device=flat.device), max(1, most // length)
    for i in range(0, len(excerpts), step):
        x = tokens(excerpts[i : i + step], flat.device)
        with torch.no_grad():
            logits = stack.forward(x, flat)[:, :, :-1]
        for e, one in enumerate(logits):
            total[e] += F.cross_entropy(one.flatten(0, 1), x[:, 1:].flatten(), reduction="sum")
    return (total / (len(excerpts) * (length - 1)) / 0.6931471805599453).tolist()
