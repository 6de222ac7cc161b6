"""`python -m tests.carried_rounding`: what carrying the rounding of Ai does to the whole prefill.

The kernels in Triton's interpreter with and without it, beside SGLang's chain emulated in plain
torch, on the same inputs; writes benchmarks/results/carried-rounding-cpu.json, no GPU needed.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before Triton decorates the first kernel

import torch
import triton
import triton.language as tl

from benchmarks import output, provenance
from sglang_trinv.kernels import prefill_prepare
from sglang_trinv_cpu_platform import bfloat16
from tests.inputs import HARD_INPUTS
from tests.prefill_checks import (
    NEARER_KEYS,
    prefill_call,
    run_prefill,
    stock_chain_emulated,
    truth_of,
)
from tests.tolerance import rel_err

OUT = Path(__file__).parents[1] / "benchmarks" / "results" / "carried-rounding-cpu.json"
TOKENS = 320


@triton.jit
def nearest(b_E, dtype: tl.constexpr, IO: tl.constexpr):
    """In the place of ``carry_rounding``: each entry is rounded by itself."""
    return b_E


def main() -> None:
    bfloat16.install()
    carried, rows = prefill_prepare.carry_rounding, []
    for name, case in (HARD_INPUTS | NEARER_KEYS).items():
        call = prefill_call(case, [TOKENS], ratio=2, K=128, V=128, zeros=True)
        truth, slots = truth_of(call), call.indices.long()
        found = {"sglang, emulated": stock_chain_emulated(call)}
        for way, function in (("nearest", nearest), ("carried", carried)):
            prefill_prepare.carry_rounding = function
            call.pool.zero_()
            found[way] = run_prefill(call, return_h=False)[0], call.pool[slots].clone()
        for way, results in found.items():
            o, state = (rel_err(a, t) for a, t in zip(results, truth, strict=True))
            rows.append({"keys": name, "rounding": way, "o": o, "state": state})
            print(f"{name:28} {way:18} {o:.2e} {state:.2e}", flush=True)
    about = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "commit": provenance.commit(),
        "torch": torch.__version__, "triton": triton.__version__, "device": "Triton's interpreter",
        "tokens": TOKENS, "dtype": "bfloat16", "argv": ["python", "-m", "tests.carried_rounding"],
    }  # fmt: skip
    output.write(OUT, {"provenance": about, "rows": rows})


if __name__ == "__main__":
    main()
