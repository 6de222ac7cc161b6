"""Tables and the roofline plot out of the JSON of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks import methods, output, prefill_report, serve_report
from benchmarks.cases import Case, spell

Row = dict[str, Any]
IMPLEMENTATIONS = ("ours", "sglang", "fla", "flashinfer")
NOTE = """\
Medians in microseconds, 20th and 80th percentile in brackets. Device: between two events around the
call on a stream with a cold L2 and a head start for the host. Wall: from the call to the end of its
kernels. "own metadata": the call gets lengths that it has not seen before and prepares what it
needs; "given": chunk_indices is handed in. Error: the worst relative Frobenius error of a result
against float64. Memory: most held at once beyond the inputs, results included. Floor: least bytes
at the bandwidth of a copy measured in the same run."""

MOST_DESIGNS = 8
DESIGNS = f"""\
The {MOST_DESIGNS} fastest designs of each op that were tried, medians in microseconds. What they
are, which are kept and why those are no faster, and the designs of the whole prefill:
[designs](designs.md)."""
INTRA_OPS = ("kkt_solve", "fwd_intra", "solve_tril", "chunk_kda_fwd_intra")


def title(row: Row) -> str:
    case = Case(row["op"], tuple(row["lengths"]), row["hk"], row["hv"])
    metadata = {"none": "", "inside": ", own metadata", "given": ", given"}[row["metadata"]]
    return case.title + metadata


def line(row: Row) -> str:
    """One row for the terminal."""
    name = " ".join(filter(None, (row["impl"], row["variant"])))
    return (
        f"{row['op']:20} {title(row):32} {name:16} {_time(row):>24} us, wall "
        f"{row['wall']['median_us']:8.1f} us, error {row['rel_err']:.2e}"
        + ("  TOO INACCURATE" if row["accurate"] is False else "")
    )


def table(found: dict[str, Any]) -> str:
    """A Markdown table of every case: implementations side by side."""
    bandwidth = found["provenance"]["copy_bytes_per_s"]
    lines = [
        "| op | lengths, heads | implementation | device, us | wall, us | error | memory, MiB "
        "| speed-up over SGLang | floor, us | goal, us |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        name = " ".join(filter(None, (row["impl"], row["variant"])))
        goal = row["at_most_us"] if row["impl"] == "ours" else None
        stock = _stock(found["rows"], row)
        speed = f"{stock['median_us'] / row['median_us']:.2f}" if stock else ""
        cells = (
            row["op"], title(row), name, _time(row), f"{row['wall']['median_us']:.0f}",
            f"{row['rel_err']:.1e}", f"{row['peak_bytes'] / 2**20:.0f}", speed,
            f"{row['least_bytes'] / bandwidth * 1e6:.0f}",
            "" if goal is None else f"{goal:.0f}{'' if row['median_us'] <= goal else ' (missed)'}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(row: Row) -> str:
    return f"{row['median_us']:.1f} [{row['p20_us']:.1f}, {row['p80_us']:.1f}]"


def _stock(rows: list[Row], row: Row) -> Row | None:
    """SGLang's row of the same case; fla has no variants and is held against SGLang's unfused."""
    same = ("op", "lengths", "hk", "hv", "metadata")
    variant = row["variant"] or ("unfused" if row["impl"] == "fla" else "")
    for other in rows:
        alike = other["impl"] == "sglang" and all(other[n] == row[n] for n in same)
        if alike and other["variant"] in (variant, ""):
            return other
    return None


def plot(found: dict[str, Any], path: Path) -> None:
    """Write the roofline: each implementation's cases under the bandwidth of a copy."""
    figure = output.figure(path, 8, 5)
    if figure is None:
        return
    axes = figure.subplots()
    bandwidth = found["provenance"]["copy_bytes_per_s"]
    intensity = [row["flops"] / row["least_bytes"] for row in found["rows"]]
    ends = [min(intensity) / 1.5, max(intensity) * 1.5]
    axes.plot(ends, [x * bandwidth / 1e12 for x in ends], "k-", label="copy bandwidth")
    for impl, marker in zip(IMPLEMENTATIONS, "os^d", strict=True):
        rows = [row for row in found["rows"] if row["impl"] == impl]
        if rows:
            axes.plot(
                [row["flops"] / row["least_bytes"] for row in rows],
                [row["flops"] / row["median_us"] / 1e6 for row in rows],
                marker, label=impl, alpha=0.7,
            )  # fmt: skip
    for op in dict.fromkeys(row["op"] for row in found["rows"]):
        x = min(row["flops"] / row["least_bytes"] for row in found["rows"] if row["op"] == op)
        axes.annotate(op, (x, x * bandwidth / 1e12), rotation=30, ha="left", va="bottom")
    axes.set(
        xscale="log", yscale="log", xlabel="operations per byte that must move",
        ylabel="TFLOP/s", title=f"Intra-chunk ops, {found['provenance']['gpu']}",
    )  # fmt: skip
    axes.legend()
    output.save(figure, path, 150)


def performance(results: Path) -> str:
    """Text of docs/performance.md from the committed results."""
    parts = [
        "# Performance",
        "",
        "Generated by `python -m benchmarks tables`; not to be edited.",
        "",
    ]
    for path in sorted(results.glob("intra-*.json")):
        found = json.loads(path.read_text())
        parts += [f"## Intra-chunk ops: {found['provenance']['gpu']}", "", _origin(path, found)]
        parts += ["", NOTE, "", table(found), "", f"![Roofline](../{_shown(path)}.png)", ""]
    for path in sorted(results.glob("prefill-*.json")):
        found = json.loads(path.read_text())
        parts += [f"## Whole prefill: {found['provenance']['gpu']}", "", _origin(path, found), ""]
        parts += [prefill_report.NOTE, "", prefill_report.table(found), ""]
        parts += [prefill_report.summary(found), "", f"![Prefill](../{_shown(path)}.png)", ""]
    for path in sorted(results.glob("methods-*.json")):
        found = json.loads(path.read_text())
        parts += [f"## Methods: {found['provenance']['gpu']}", "", methods.NOTE, ""]
        parts += [methods.table(found), "", f"![Methods](../{_shown(path)}.png)", ""]
    for path in sorted(results.glob("serve-*.json")):
        found = json.loads(path.read_text())
        parts += [f"## {serve_report.heading(found)}", "", serve_report.NOTE, ""]
        parts += [serve_report.table(found), "", f"![Servers](../{_shown(path)}.png)", ""]
    for path in sorted(results.glob("designs-*.json")):
        found = json.loads(path.read_text())
        parts += [f"## Designs: {found['provenance']['gpu']}", "", DESIGNS, ""]
        parts += [f"Timing: {found['provenance']['timing']}.", "", designs(found["rows"])]
    path = results / "resources.json"
    if path.is_file():
        parts += [
            "## Registers, spills, shared memory",
            "",
            resources(json.loads(path.read_text())),
        ]
    return "\n".join(parts).rstrip() + "\n"


def designs(rows: list[Row]) -> str:
    """Markdown table for each op of the intra-chunk step: designs by their time in one shape."""
    parts = []
    for op in (op for op in INTRA_OPS if any(row["op"] == op for row in rows)):
        times: dict[str, dict[str, float]] = {}  # shape -> design -> its best time
        for row in (row for row in rows if row["op"] == op):
            seen = times.setdefault(f"{spell(row['lengths'])}, {row['hk']}/{row['hv']}", {})
            seen[row["design"]] = min(row["median_us"], seen.get(row["design"], math.inf))
        shapes = sorted(times, key=lambda shape: -len(times[shape]))[:3]
        lines = [f"| {op} | {' | '.join(shapes)} |", f"|---{'|---' * len(shapes)}|"]
        for design in sorted(times[shapes[0]], key=times[shapes[0]].get)[:MOST_DESIGNS]:
            cells = (times[shape].get(design) for shape in shapes)
            shown = ["" if us is None else f"{us:.1f}" for us in cells]
            lines.append(f"| {design} | {' | '.join(shown)} |")
        parts += [*lines, ""]
    return "\n".join(parts)


def _shown(path: Path) -> str:
    return path.with_suffix("").relative_to(path.parents[2]).as_posix()


def _origin(path: Path, found: dict[str, Any]) -> str:
    origin = found["provenance"]
    versions = ", ".join(f"{n} {v}" for n, v in origin["versions"].items() if v)
    bandwidth = origin.get("copy_bytes_per_s") or found["copy_bytes_per_s"]
    return (
        f"From `{_shown(path)}.json`: {origin['when']}, commit {origin['commit']}, driver "
        f"{origin['driver']}, {versions}; {origin['rounds']} rounds; a copy moves "
        f"{bandwidth / 1e12:.2f} TB/s."
        + (f" Beside it ran {origin['beside']}." if "beside" in origin else "")
    )


def resources(found: dict[str, Any]) -> str:
    """Markdown table of `python -m benchmarks resources`."""
    lines = [
        f"Triton {found['triton']}, ahead of time. Spilled: bytes of stack a "
        "thread. AMD's numbers are not in its compiler's metadata.",
        "",
        "| kernel | architecture | registers | spilled, bytes | shared, bytes | compile, s |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = [row[n] for n in ("kernel", "arch", "registers", "stack_bytes", "shared_bytes")]
        shown = ["" if cell is None else str(cell) for cell in (*cells, row["compile_s"])]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)
