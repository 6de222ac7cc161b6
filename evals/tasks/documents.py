"""Data sets of the lm-eval tasks. Every function takes ``levels`` from the task's YAML.

lm-eval imports this file by its path, perhaps where the package is not installed, so its two
neighbours are loaded by path too.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets

Level = dict[str, Any]
SEED = "eval"  # training draws from "train", the trained model's check from "check"


def _neighbour(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generators, sources = _neighbour("generators"), _neighbour("sources")


def overwrite(levels: list[Level], **_: Any) -> dict[str, datasets.Dataset]:
    """Levels: keys (one | two), n_keys, writes, n."""
    return _questions("overwrite", levels, lambda r, v, i: generators.overwrite(
        r, v["keys"], v["n_keys"], v["writes"]))  # fmt: skip


def mqar(levels: list[Level], **_: Any) -> dict[str, datasets.Dataset]:
    """Levels: keys (one | two), n_keys, n."""
    return _questions("mqar", levels, lambda r, v, i: generators.mqar(r, v["keys"], v["n_keys"]))


def correlated(levels: list[Level], **_: Any) -> dict[str, datasets.Dataset]:
    """Levels: n_keys, writes, n."""
    return _questions("correlated", levels, lambda r, v, i: generators.correlated(
        r, v["n_keys"], v["writes"]))  # fmt: skip


def boundary(levels: list[Level], **_: Any) -> dict[str, datasets.Dataset]:
    """Levels: lengths, rows (first, last), n; rows and lengths are gone through in turn."""

    def make(r: random.Random, v: Level, i: int) -> tuple[str, str]:
        first, last = v["rows"]
        cells = [(row, length) for length in v["lengths"] for row in range(first, last + 1)
                 if row <= length - 3]  # fmt: skip
        row, length = cells[i * len(cells) // v["n"]]
        return generators.boundary(r, row, length, v.get("n_keys", 5))

    return _questions("boundary", levels, make)


def niah(levels: list[Level], **_: Any) -> dict[str, datasets.Dataset]:
    """Levels: n_keys, length, n; the depth goes from start to end."""
    return _questions("niah", levels, lambda r, v, i: generators.niah(
        r, v["n_keys"], v["length"], i / max(1, v["n"] - 1)))  # fmt: skip


def rolling(levels: list[Level], **_: Any) -> dict[str, datasets.Dataset]:
    """Levels: text (source | dense), length, spread, n: lengths go up to length + spread - 1."""
    rows, texts = [], sources.corpus(held_out=True)
    for number, v in enumerate(levels):
        r = random.Random(f"{SEED}-rolling-{number}")
        for i in range(v["n"]):
            length = v["length"] + i % v["spread"]
            if v["text"] == "dense":
                text = generators.dense(r, v["keys"], v["n_keys"], length).text
            else:
                text = ""
                while len(text) < length:  # excerpts end with their file
                    text = sources.excerpt(r, texts, length)
            rows.append({"id": len(rows), "level": number, "text": text})
    return {"test": datasets.Dataset.from_list(rows)}


def _questions(
    name: str,
    levels: list[Level],
    make: Callable[[random.Random, Level, int], tuple[str, str]],
) -> dict[str, datasets.Dataset]:
    rows: list[dict[str, Any]] = []
    for number, level in enumerate(levels):
        r = random.Random(f"{SEED}-{name}-{sorted(level.items())}")
        for i in range(level["n"]):
            context, answer = make(r, level, i)
            row = {"id": len(rows), "level": number, "context": context, "answer": answer}
            rows.append(row)
    return {"test": datasets.Dataset.from_list(rows)}
