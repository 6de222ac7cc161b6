"""`python -m benchmarks methods`: speed against worst-case error, by method of the inverse.

The whole layer on one sequence of 8192 tokens with 16 key and 32 value heads, by each method of
``SGLANG_TRINV_METHOD``, SGLang's Triton chain and FlashInfer, in turns; the error is the worst one
of output and final state over ``prefill.HARD``.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import prefill, timing
from benchmarks.provenance import provenance
from sglang_trinv.ops.methods import METHODS

LENGTHS, HK, HV = (8192,), 16, 32
NOTE = """\
The whole layer on 8192 tokens with 16 key and 32 value heads by method of the inverse
(`SGLANG_TRINV_METHOD`), SGLang's Triton chain and FlashInfer in turns. Error: the worst relative
Frobenius error of output or final state on random, near-equal and equal keys."""


def main(
    out: Path, sglang: str | None, release: str | None, with_flashinfer: bool, rounds: int
) -> int:
    """Measure, print a line each, write ``out`` and its plot; returns the exit code."""
    ours = {name: partial(prefill.ours, method=name) for name in METHODS if name != "auto"}
    layers = {**ours, **prefill.peers(sglang, with_flashinfer)}
    errors = {keys: prefill.accuracy(keys, layers) for keys in prefill.HARD}
    x = prefill.build(LENGTHS, HK, HV)
    times = timing.measure({n: partial(prefill.fresh, f, x) for n, f in layers.items()}, rounds)
    rows = []
    for name in layers:
        seen = {keys: max(found[name]) for keys, found in errors.items()}
        row = {
            "op": prefill.OP, "lengths": list(LENGTHS), "hk": HK, "hv": HV, "dtype": "bfloat16",
            "impl": "ours" if name in ours else name, "method": name if name in ours else "",
            **times[name]["device"], "wall": times[name]["wall"], "rel_err": max(seen.values()),
            "rel_errs": seen,
        }  # fmt: skip
        print(f"{name:14} {row['median_us']:8.1f} us, worst error {row['rel_err']:.2e}", flush=True)
        rows.append(row)
    origin = {**provenance(sglang, release), "rounds": rounds}
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {"provenance": origin, "rows": rows}
    out.write_text(json.dumps(found, indent=1) + "\n")
    scatter(found, out.with_suffix(".png"))
    return 0


def scatter(found: dict[str, Any], path: Path) -> None:
    """Write the plot: time against worst error."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} not drawn: matplotlib is not installed")
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for row in found["rows"]:
        mine = row["impl"] == "ours"
        x, y = row["median_us"], row["rel_err"]
        axes.plot(x, y, "o" if mine else "s", color="C0" if mine else "C1")
        axes.annotate(row["method"] or row["impl"], (x, y), fontsize=8, xytext=(4, 3),
                      textcoords="offset points")  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="device time, us", ylabel="worst error, near-equal keys",
        title=f"Whole prefill, 8192 tokens, {HK}/{HV} heads, {found['provenance']['gpu']}",
    )  # fmt: skip
    axes.margins(0.2)
    figure.savefig(path, dpi=120)
    print(f"{path} drawn")


def table(found: dict[str, Any]) -> str:
    """Markdown table of the rows."""
    lines = ["| method | device, us | wall, us | worst error |", "|---|---|---|---|"]
    for row in found["rows"]:
        time = f"{row['median_us']:.0f} [{row['p20_us']:.0f}, {row['p80_us']:.0f}]"
        wall = f"{row['wall']['median_us']:.0f}"
        lines.append(f"| {row['method'] or row['impl']} | {time} | {wall} | {row['rel_err']:.1e} |")
    return "\n".join(lines)
