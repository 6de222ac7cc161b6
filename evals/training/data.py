"""Training batches: the tasks' documents, text and a little chat, made harder step by step."""

from __future__ import annotations

import functools
import math
import random

import numpy as np

from sglang_trinv.evals.tasks import generators as gen
from sglang_trinv.evals.tasks import sources

PAD_ID, IM_START, IM_END = 256, 257, 258
NOTHING, LANGUAGE, ANSWER = 0, 1, 2  # what a target token counts as in the loss
KINDS = {"overwrite": 36, "mqar": 15, "niah": 10, "correlated": 14, "chat": 5, "text": 20}
LENGTHS = (  # share of the run, then the weights of the batch lengths
    (0.08, {64: 8, 128: 2}),
    (0.30, {64: 3, 128: 5, 256: 2}),
    (0.60, {64: 2, 128: 3, 256: 4, 512: 1}),
    (1.01, {64: 2, 128: 3, 256: 3, 512: 2, 1024: 1}),
)

Row = tuple[list[int], list[int]]  # tokens, and what each counts as


def length_of(seed: int, index: int, done: float) -> int:
    """Length of batch ``index`` when ``done`` (0 to 1) of the run is over."""
    weights = next(w for until, w in LENGTHS if done < until)
    r = random.Random(f"length-{seed}-{index}")
    return r.choices(list(weights), list(weights.values()))[0]


def batch(seed: int, index: int, done: float, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their loss classes, both [rows, length]; about ``tokens`` in all."""
    length = length_of(seed, index, done)
    rows = max(1, tokens // length)
    r = random.Random(f"train-{seed}-{index}")
    x = np.full((rows, length), PAD_ID, dtype=np.int16)
    kinds = np.zeros((rows, length), dtype=np.int8)
    for i in range(rows):
        ids, marks = row(r, length, min(1.0, 1.6 * done))
        x[i, : len(ids)] = ids[:length]
        kinds[i, : len(marks)] = marks[:length]
    return x, kinds


def row(r: random.Random, length: int, hard: float) -> Row:
    """One document of at most ``length`` tokens; ``hard`` (0 to 1) widens the range of keys."""
    kind = r.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "text":
        text = sources.excerpt(r, corpus(), length)
        return list(text.encode()), [LANGUAGE] * len(text)
    if kind == "chat":
        return chat(r, length)
    size = r.randint(2 * length // 3, length)
    if kind == "niah":
        return marked(haystack(r, size))
    if kind == "correlated":
        return marked(stream(r, "four", _upto(r, 2, 4 + 12 * hard, size // 12), size))
    names = "two" if r.random() < 0.3 else "one"
    if kind == "mqar":
        most = 5 + (120 if names == "two" else 21) * hard
        n = _upto(r, 2, most, size // (2 * _pair(names)))
        return marked(asked_at_end(r, names, n, n, size))
    most = 4 + (92 if names == "two" else 22) * hard
    return marked(stream(r, names, _upto(r, 2, most, size // (3 * _pair(names))), size))


def stream(r: random.Random, names: str, n_keys: int, size: int) -> gen.Script:
    """Overwritten keys, asked to and fro or at the end."""
    if r.random() < 0.7:
        return gen.dense(r, names, n_keys, size)
    room = (size - 1) // _pair(names)
    return asked_at_end(r, names, n_keys, room - min(n_keys, 12), size)


def asked_at_end(r: random.Random, names: str, n_keys: int, writes: int, size: int) -> gen.Script:
    """``writes`` writes, then a question for as many keys as fit."""
    script = gen.Script(r)
    pads = 0.1 if r.random() < 0.2 else 0.0
    gen.write_all(script, gen.keys(r, names, n_keys), max(n_keys, int(writes * (1 - pads))), pads)
    return ask_all(r, script, size)


def haystack(r: random.Random, size: int) -> gen.Script:
    """Pairs in filler, all asked at the end."""
    script, n = gen.Script(r), min(r.randint(1, 6), size // 8)
    gaps = max(n, size - 4 * n - 1)
    done = 0
    spots = sorted(r.randrange(gaps) for _ in range(n))
    for name, spot in zip(gen.keys(r, "one", n), spots, strict=True):
        script.add("".join(r.choices(gen.FILLER, k=spot - done)))
        script.write(name)
        done = spot
    script.add("".join(r.choices(gen.FILLER, k=gaps - done)))
    return ask_all(r, script, size)


def ask_all(r: random.Random, script: gen.Script, size: int) -> gen.Script:
    """Add a question for as many keys as fit, in random order, each once."""
    names = list(script.stored)
    room = max(1, (size - script.size - 1) // (len(names[0]) + 1))
    script.add("|")
    for name in r.sample(names, min(room, len(names))):
        script.ask(name)
    return script


def chat(r: random.Random, length: int) -> Row:
    """One question through the chat template of the model; the answer is a digit, then the end."""
    n = r.randint(2, 5)
    user = list(b"user\n")
    room = (length - 26) // 2
    context, answer = gen.overwrite(r, "one", n, r.randint(n, max(n, min(20, room))))
    prompt = [IM_START, *user, *context.encode(), IM_END, 10, IM_START, *b"assistant\n"]
    ids = [*prompt, ord(answer), IM_END]
    return ids, [LANGUAGE] * len(prompt) + [ANSWER, ANSWER]


def marked(script: gen.Script) -> Row:
    """Tokens of a document and the classes of its targets."""
    ids = list(script.text.encode())
    marks = [LANGUAGE] * len(ids)
    for at in script.answers:
        marks[at] = ANSWER
    return ids, marks


@functools.cache
def corpus() -> list[str]:
    """Training texts, read once a process."""
    return sources.corpus(held_out=False)


def _pair(names: str) -> int:
    return {"one": 2, "two": 3, "four": 5}[names]


def _upto(r: random.Random, least: int, most: float, fits: int) -> int:
    """Log-uniform between ``least`` and the smaller of ``most`` and ``fits``."""
    most = max(least, min(most, fits))
    return round(math.exp(r.uniform(math.log(least), math.log(most))))
