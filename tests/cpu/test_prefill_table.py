"""The table by which the whole prefill takes over, against the committed measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_trinv import prefill
from sglang_trinv.config import Config
from sglang_trinv.serve import doctor


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


@pytest.mark.parametrize(
    ("capability", "settings", "said"),
    [
        ((9, 0), {}, "ours takes its place with 2/4, 4/8, "),
        ((9, 0), {"gdn": "intra"}, "our kernels are called only with --linear"),
        ((10, 0), {}, "our kernels are called only with --linear"),
        ((10, 0), {"force": True}, "SGLANG_TRINV_FORCE=1 displaces it"),
    ],
)
def test_doctor_says_who_answers_for_flashinfer(
    capability: tuple[int, int], settings: dict[str, Any], said: str
) -> None:
    assert doctor._whose("flashinfer", capability, Config(**settings)).startswith(said)
