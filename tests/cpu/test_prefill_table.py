"""The table by which the whole prefill takes over, against the committed measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sglang_trinv import prefill


def test_the_table_says_what_was_measured() -> None:
    """Each row of the table: ours was the faster one wherever its evidence has such a call."""
    results = Path(__file__).parents[2] / "benchmarks/results"
    for win in prefill.WINS:
        rows = [r for f in win.evidence for r in json.loads((results / f).read_text())["rows"]]
        peer = {"triton": "sglang", "flashinfer": "flashinfer"}[win.instead_of]
        for heads in win.heads:
            seen: dict[Any, dict[str, Any]] = {}
            for r in rows:
                if (r["hk"], r["hv"]) == heads:
                    seen.setdefault(tuple(r["lengths"]), {})[r["impl"]] = r
            assert min(map(sum, seen)) <= win.least_tokens
            for r in seen.values():
                assert r["ours"]["p80_us"] < r[peer]["p20_us"]
                assert r["ours"]["wall"]["p80_us"] < r[peer]["wall"]["p20_us"]
