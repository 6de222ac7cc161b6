"""Every kernel compiles for every supported architecture; no GPU is needed for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
from benchmarks.resources import compile_kernel, names
arch = int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1]
for name in names(arch):
    print(json.dumps(compile_kernel(name, arch).as_dict()), flush=True)
"""
HOPPER = """
import json
from benchmarks.resources import HOPPER, compile_kernel
dense = {"cu_seqlens": None, "chunk_indices": None, "VARLEN": False}
for name in HOPPER:
    if "scores" in name:
        continue
    more = {"g": None} if "kkt" in name or "fwd_intra" in name else {}
    for changed in (dense, {"chunk_indices": None}, more):
        print(json.dumps(compile_kernel(name, 90, **changed).as_dict()))
"""
WITHOUT_STATE = """
from benchmarks.resources import compile_kernel
absent = {"state": None, "state_indices": None}
for name, n in (("prefill state", 3), ("prefill combine", 2)):
    flags = dict.fromkeys(("HAS_STATE", "HAS_INDICES", "WRITE_STATE")[:n], False)
    print(compile_kernel(name, 80, **absent, **flags).binary_bytes)
"""


def run(program: str, *words: str) -> list[str]:
    """Its lines, from a process of its own: here kernels are imported for Triton's interpreter."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("arch", ["80", "89", "90", "100", "120", "gfx942"])
def test_compiles(arch: str) -> None:
    rows = [json.loads(line) for line in run(PROGRAM, arch)]
    assert len(rows) == (26 if arch == "90" else 17)
    for row in rows:
        if row["arch"] in ("sm_80", "sm_90"):
            assert row["stack_bytes"] == 0, row
    for row in rows:
        assert row["binary_bytes"] > 0
        assert row["registers"] is None or row["registers"] <= 255


def test_every_kind_of_call_compiles_for_hopper() -> None:
    """Without cu_seqlens, chunk_indices or g; none spills."""
    rows = [json.loads(line) for line in run(HOPPER)]
    assert len(rows) == 24
    for row in rows:
        assert row["stack_bytes"] == 0, row


def test_the_prefill_without_a_state_compiles() -> None:
    assert all(int(line) > 0 for line in run(WITHOUT_STATE))
