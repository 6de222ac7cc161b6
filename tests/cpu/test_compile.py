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


# Bytes of stack a thread on sm_80 and sm_90; every other kernel but those of the x3 methods: none.
SPILLED = {
    "fwd_intra fp16": 96,
    "kda_intra fused fp16": 144,  # with 16 columns at once none, and on the H200 a quarter slower
    "kda_intra unfused fp16": 144,
    "prefill state": 128,
    "prefill transfer": 16,
}


@pytest.mark.parametrize("arch", ["80", "89", "90", "100", "120", "gfx942"])
def test_compiles(arch: str) -> None:
    """In a process of its own: here the kernels are imported for Triton's interpreter."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, arch], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == (21 if arch == "90" else 16)
    for row in rows:
        if row["arch"] in ("sm_80", "sm_90") and "x3" not in row["kernel"]:
            assert row["stack_bytes"] <= SPILLED.get(row["kernel"], 0), row
    for row in rows:
        assert row["binary_bytes"] > 0
        assert row["registers"] is None or row["registers"] <= 255
