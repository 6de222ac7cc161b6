"""Where the GPU's time of one prefill goes, by SGLang's own profiler in a server that runs."""

from __future__ import annotations

import gzip
import json
import random
import re
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

from sglang_trinv.serve import health
from sglang_trinv.serve.config import ServeConfig, ServeError

# What a prefill backend of GDN computes: SGLang's chain from its gates' sums to the output (l2norm
# included), FlashInfer's kernels, ours. Convolution and gates are the same in every arm.
GDN = re.compile(
    r"l2norm_fwd|chunk_local_cumsum|chunk_scaled_dot_kkt|solve_tril|to_64x64_inverse|kkt_solve"
    r"|recompute_w_u|chunk_fwd_kernel_o|flashinfer\w*gdn|gdn_kernels"
    r"|delta_rule|fwd_intra_kernel|inverse_kernel|scores_kernel|state_kernel|transfer_kernel"
    r"|combine_kernel"
)
LISTED = 20  # kernels that take the most time
TRACE_TIMEOUT_S = 60.0

Row = dict[str, Any]


def profile(config: ServeConfig, tokens: int, folder: Path) -> Row:
    """Profile one prefill of ``tokens`` random tokens; what ``summary`` says of it.

    Raises:
        ServeError: the server refuses, or leaves no trace.
    """
    source = random.Random(tokens)
    ids = [source.randrange(32, 127) for _ in range(tokens)]
    start = {"output_dir": str(folder), "activities": ["GPU"], "with_stack": False}
    health.post(config, "/start_profile", start, TRACE_TIMEOUT_S)
    request = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
    health.post(config, "/generate", request, TRACE_TIMEOUT_S)
    health.post(config, "/stop_profile", {}, TRACE_TIMEOUT_S)
    return summary(_trace(folder))


def _trace(folder: Path) -> Row:
    """The trace in ``folder``, once it is whole."""
    end = time.monotonic() + TRACE_TIMEOUT_S
    while time.monotonic() < end:
        with suppress(StopIteration, EOFError, OSError, ValueError):  # not there, being written
            return json.loads(gzip.decompress(next(folder.rglob("*.trace.json.gz")).read_bytes()))
        time.sleep(0.2)
    raise ServeError(f"the profiler left no trace in {folder}")


def summary(trace: Row) -> Row:
    """Milliseconds of all kernels and of GDN's; the longest kernels with milliseconds and calls."""
    spent: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    for event in trace["traceEvents"]:
        if event.get("cat") == "kernel":
            spent[event["name"]] += event["dur"] / 1e3
            calls[event["name"]] += 1
    gdns = {name for name in spent if GDN.search(name)}
    longest = sorted(spent, key=lambda name: -spent[name])[:LISTED]
    return {
        "kernels_ms": round(sum(spent.values()), 3),
        "gdn_ms": round(sum(spent[name] for name in gdns), 3),
        "longest": [
            {"name": n[:120], "ms": round(spent[n], 3), "calls": calls[n], "gdn": n in gdns}
            for n in longest
        ],
    }
