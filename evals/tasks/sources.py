"""Excerpts of Python's standard library as text: whole files are held out of training."""

from __future__ import annotations

import random
import sysconfig
import zlib
from pathlib import Path

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo",
           "ensurepip", "encodings", "pydoc_data", "__pycache__", "__phello__"}  # fmt: skip
ONE_IN = 20  # share of the files that is held out


def files(held_out: bool) -> list[Path]:
    """Source files of the running Python; a file's share depends on its relative path alone."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if SKIPPED.isdisjoint(relative.parts):
            mine = zlib.crc32(relative.as_posix().encode()) % ONE_IN == 0
            if mine == held_out and path.stat().st_size >= 2048:
                found.append(path)
    return sorted(found)


def corpus(held_out: bool) -> list[str]:
    """The ASCII files' texts."""
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in files(held_out))
    return [text for text in texts if text.isascii()]


def excerpt(r: random.Random, texts: list[str], length: int) -> str:
    """``length`` characters from the start of a line, or fewer at a file's end."""
    text = r.choice(texts)
    start = text.rfind("\n", 0, r.randrange(max(1, len(text) - length))) + 1
    return text[start : start + length]
