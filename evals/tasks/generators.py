"""Seeded documents whose answers depend on the delta rule. Bytes only, standard library only.

A document is a stream of writes (a key, then a one-digit value), then ``|`` and questions (a key,
whose value is the answer). ``;`` goes back to writing. ``.`` between two pairs means nothing. The
last write of a key wins. Training, the trained model's own check and the lm-eval tasks draw from
these functions under different seed names, so no document is in two of them.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

VALUES = string.digits
PAD = "."
FILLER = " .,:-_/"
LOWER, UPPER = string.ascii_lowercase, string.ascii_uppercase
CHUNK = 64  # chunk of the delta rule in prefill


class Script:
    """A document being written, the state that it stores, and where its answers are."""

    def __init__(self, r: random.Random) -> None:
        self.r = r
        self.parts: list[str] = []
        self.size = 0
        self.stored: dict[str, str] = {}
        self.writes: dict[str, int] = {}
        self.answers: list[int] = []

    def add(self, text: str) -> None:
        """Append bytes without a meaning of their own."""
        self.parts.append(text)
        self.size += len(text)

    def write(self, key: str) -> None:
        """Store a value, another one than the key has now, so that a stale answer is wrong."""
        old = self.stored.get(key)
        self.stored[key] = self.r.choice(VALUES if old is None else VALUES.replace(old, ""))
        self.writes[key] = self.writes.get(key, 0) + 1
        self.add(key + self.stored[key])

    def ask(self, key: str) -> None:
        """Append a question and its answer."""
        self.answers.append(self.size + len(key))
        self.add(key + self.stored[key])

    def overwritten(self) -> list[str]:
        """Keys written more than once, or all of them if there is none."""
        return [k for k, n in self.writes.items() if n > 1] or list(self.stored)

    @property
    def text(self) -> str:
        """The whole document."""
        return "".join(self.parts)


def keys(r: random.Random, kind: str, n: int) -> list[str]:
    """``n`` different keys: "one" or "two" lower-case letters, or "four" upper-case ones that
    share three of their four bytes."""
    if kind == "one":
        return r.sample(LOWER, n)
    if kind == "two":
        return [LOWER[i // 26] + LOWER[i % 26] for i in r.sample(range(676), n)]
    base, at = r.choices(UPPER, k=4), r.randrange(4)
    return ["".join([*base[:at], letter, *base[at + 1 :]]) for letter in r.sample(UPPER, n)]


def write_all(script: Script, names: Sequence[str], writes: int, pads: float = 0.0) -> None:
    """Every key once, then random ones until ``writes``; with ``pads``, some padding between."""
    for i in range(writes):
        if pads and script.r.random() < pads:
            script.add(PAD)
        script.write(names[i] if i < len(names) else script.r.choice(names))


def overwrite(r: random.Random, kind: str, n_keys: int, writes: int) -> tuple[str, str]:
    """Context and answer: keys written again and again, one question about the last value."""
    script = Script(r)
    write_all(script, keys(r, kind, n_keys), writes)
    return _question(script, r.choice(script.overwritten()))


def mqar(r: random.Random, kind: str, n_keys: int) -> tuple[str, str]:
    """Context and answer: distinct pairs, one question."""
    script = Script(r)
    write_all(script, keys(r, kind, n_keys), n_keys)
    return _question(script, r.choice(list(script.stored)))


def correlated(r: random.Random, n_keys: int, writes: int) -> tuple[str, str]:
    """Context and answer: keys that share three of four bytes, overwritten."""
    return overwrite(r, "four", n_keys, writes)


def boundary(r: random.Random, row: int, length: int, n_keys: int = 5) -> tuple[str, str]:
    """The value of the last write to the asked key is at chunk row ``row``.

    Args:
        length: tokens of the context, question included; the write is in the last chunk that ends
            before the question does, and the writes after it are to other keys.
    """
    chunk = (length - 3 - row) // CHUNK
    if row < 2 * n_keys and chunk == 0:  # too early for an overwrite: fewer keys
        n_keys = max(2, (row + 1) // 4)
    at = chunk * CHUNK + row  # position of the value byte
    if chunk < 0 or at < 1 or at + 3 > length:
        raise ValueError(f"row {row} does not fit into {length} tokens")
    script, names = Script(r), keys(r, "one", n_keys)
    if at % 2 == 0:
        script.add(PAD)
    asked = r.choice(names)
    before = (at - 1 - script.size) // 2
    order = names[:before] if before >= n_keys else ([asked, *names] if before else [])[:before]
    for name in [*order, *(r.choice(names) for _ in range(before - len(order)))]:
        script.write(name)
    script.write(asked)
    others = [name for name in names if name != asked]
    while script.size + 2 <= length - 2:
        script.write(r.choice(others))
    if script.size < length - 2:
        script.add(PAD)
    return _question(script, asked)


def niah(r: random.Random, n_keys: int, length: int, depth: float | None = None) -> tuple[str, str]:
    """Context and answer: pairs hidden in filler; the asked one at ``depth`` (0 to 1) if given."""
    script, names = Script(r), keys(r, "one", n_keys)
    gaps = length - 2 - 2 * n_keys  # filler bytes
    spots = sorted(r.randrange(gaps + 1) for _ in names)
    asked = r.randrange(n_keys)
    if depth is not None:
        spots[asked] = round(depth * gaps)
        order = sorted(range(n_keys), key=spots.__getitem__)
        spots, names, asked = sorted(spots), [names[i] for i in order], order.index(asked)
    done = 0
    for name, spot in zip(names, spots, strict=True):
        script.add("".join(r.choices(FILLER, k=spot - done)))
        script.write(name)
        done = spot
    script.add("".join(r.choices(FILLER, k=gaps - done)))
    return _question(script, names[asked])


def dense(r: random.Random, kind: str, n_keys: int, length: int, ask: float = 0.6) -> Script:
    """A document of ``length`` bytes at most that goes to and fro between writes and questions."""
    script, names = Script(r), keys(r, kind, n_keys)
    pair = len(names[0]) + 1
    write_all(script, names, n_keys)
    while script.size + 2 + 2 * pair <= length:
        room = (length - script.size - 1) // pair
        script.add("|")
        for _ in range(min(room, 1 + int(r.expovariate(1 / (1 + ask * n_keys))))):
            script.ask(r.choice(names))
        room = (length - script.size - 2) // pair
        if room > 1:
            script.add(";")
            for _ in range(min(room - 1, 1 + int(r.expovariate(1 / (1 + n_keys))))):
                script.write(r.choice(names))
    return script


def _question(script: Script, asked: str) -> tuple[str, str]:
    script.add("|" + asked)
    return script.text, script.stored[asked]
