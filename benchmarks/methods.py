"""`python -m benchmarks methods`: speed against worst-case error, by method of the inverse.

The whole layer on one sequence of 8192 tokens with 16 key and 32 value heads, by each method of
``SGLANG_TRINV_METHOD``, SGLang's Triton chain and FlashInfer, in turns; the error is the worst one
of output and final state over ``prefill.HARD``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import output, prefill
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
    rows = prefill.measure(LENGTHS, HK, HV, None, layers, rounds)
    for row in rows:
        name = row["impl"]
        seen = {keys: max(found[name]) for keys, found in errors.items()}
        row |= {"rel_err": max(seen.values()), "rel_errs": seen, "method": ""}
        if name in ours:
            row |= {"impl": "ours", "method": name}
        print(f"{name:14} {row['median_us']:8.1f} us, worst error {row['rel_err']:.2e}", flush=True)
    found = {"provenance": {**provenance(sglang, release), "rounds": rounds}, "rows": rows}
    output.write(out, found)
    scatter(found, out.with_suffix(".png"))
    return 0


def scatter(found: dict[str, Any], path: Path) -> None:
    """Write the plot: time against worst error."""
    figure = output.figure(path, 6, 4)
    if figure is None:
        return
    axes = figure.subplots()
    for row in found["rows"]:
        marker = "o" if row["impl"] == "ours" else "s"
        name = row["method"] or row["impl"]
        axes.plot(row["median_us"], row["rel_err"], marker, label=name, alpha=0.8)
    axes.set(
        xscale="log", yscale="log", xlabel="device time, us", ylabel="worst error",
        title=f"Whole prefill, 8192 tokens, {HK}/{HV} heads, {found['provenance']['gpu']}",
    )  # fmt: skip
    axes.margins(0.2)
    axes.legend(fontsize=8, frameon=False)
    output.save(figure, path, 120)


def table(found: dict[str, Any]) -> str:
    """Markdown table of the rows."""
    lines = ["| method | device, us | wall, us | worst error |", "|---|---|---|---|"]
    for row in found["rows"]:
        time = f"{row['median_us']:.0f} [{row['p20_us']:.0f}, {row['p80_us']:.0f}]"
        wall = f"{row['wall']['median_us']:.0f}"
        lines.append(f"| {row['method'] or row['impl']} | {time} | {wall} | {row['rel_err']:.1e} |")
    return "\n".join(lines)
