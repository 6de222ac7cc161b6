"""Table and plot of the whole prefill, out of the JSON of a run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from sglang_trinv import prefill

Row = dict[str, Any]
PEERS = ("sglang triton", "flashinfer")
KINDS = ("device", "wall")
NOTE = """\
The layer as SGLang calls it: q and k unnormalised, the state pool in place, new lengths each time.
Medians in microseconds, 20th and 80th percentile in brackets; device and wall as above, so wall has
a cold start of the host in it. FlashInfer through the steps of SGLang's adapter. Served: which one
`SGLANG_TRINV_GDN=auto` lets answer where SGLang's choice is Triton, and where it is FlashInfer.
Memory: most held at once beyond the inputs. Floor: q, k, v, o once at the bandwidth of a copy."""


def title(row: Row) -> str:
    lengths = [*row["lengths"]]
    same = len(set(lengths)) == 1
    return f"{len(lengths)} x {lengths[0]}" if same else str(lengths)


def served(row: Row, capability: tuple[int, int] = (9, 0)) -> str:
    """What auto lets answer in place of each of SGLang's choices."""
    heads, tokens = (row["hk"], row["hv"]), sum(row["lengths"])
    return ", ".join(
        "ours" if prefill.wins(capability, choice, heads, tokens) else name
        for choice, name in (("triton", "Triton"), ("flashinfer", "FlashInfer"))
    )


def table(found: Row) -> str:
    lines = [
        "| lengths | Hk/Hv | ours, device | wall | Triton, device | wall | FlashInfer, device "
        "| wall | speed-up over Triton, FlashInfer: device | wall | served | memory, MiB: ours, "
        "Triton, FlashInfer | floor, us | goal, us |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        device, wall, goal = row["device"], row["wall"], row["at_most_us"]
        cells = [title(row), f"{row['hk']}/{row['hv']}"]
        for name in ("ours", *PEERS):
            t = device[name]
            cells += [f"{t['median_us']:.0f} [{t['p20_us']:.0f}, {t['p80_us']:.0f}]"]
            cells += [f"{wall[name]['median_us']:.0f}"]
        cells += [", ".join(f"{ratio(row, kind, p):.2f}" for p in PEERS) for kind in KINDS]
        cells += [served(row)]
        cells += [", ".join(f"{row['peak_bytes'][n] / 2**20:.0f}" for n in ("ours", *PEERS))]
        cells += [f"{row['least_bytes'] / found['copy_bytes_per_s'] * 1e6:.0f}"]
        met = device["ours"]["median_us"] <= goal
        cells += [f"{goal}{'' if met else ' (missed)'}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(row: Row, kind: str, peer: str) -> float:
    return row[kind][peer]["median_us"] / row[kind]["ours"]["median_us"]


def summary(found: Row) -> str:
    """Geometric means, least ratios and errors in sentences."""
    parts = []
    for peer, name in zip(PEERS, ("SGLang's Triton chain", "FlashInfer"), strict=True):
        said = []
        for kind in KINDS:
            ratios = [ratio(row, kind, peer) for row in found["rows"]]
            mean = statistics.geometric_mean(ratios)
            how = {"device": "on the device", "wall": "by the clock of the host"}[kind]
            said.append(f"{mean:.2f} times {how} (least {min(ratios):.2f})")
        parts.append(f"Faster than {name}, in the geometric mean, {' and '.join(said)}.")
    lines = [" ".join(parts), "", "Relative Frobenius error of (o, final state), 512 tokens:", ""]
    lines += ["| keys | ours | Triton | FlashInfer |", "|---|---|---|---|"]
    for keys, errors in found["errors"].items():
        shown = [" / ".join(f"{e:.2e}" for e in errors[n]) for n in ("ours", *PEERS)]
        lines.append(f"| {keys} | {' | '.join(shown)} |")
    return "\n".join(lines)


def plot(found: Row, path: Path) -> None:
    """Write the time against the tokens of a call, one panel for each number of heads."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} not drawn: matplotlib is not installed")
        return
    heads = list(dict.fromkeys((row["hk"], row["hv"]) for row in found["rows"]))
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, -(-len(heads) // 2), squeeze=False).flat
    for axes, (hk, hv) in zip(panels, heads, strict=False):
        rows = [row for row in found["rows"] if (row["hk"], row["hv"]) == (hk, hv)]
        rows.sort(key=lambda row: (sum(row["lengths"]), len(row["lengths"])))
        tokens = [sum(row["lengths"]) for row in rows]
        for name, marker in (("ours", "o"), ("sglang triton", "s"), ("flashinfer", "^")):
            times = [row["device"][name]["median_us"] for row in rows]
            axes.plot(tokens, times, marker, label=name, alpha=0.8)
        floor = [row["least_bytes"] / found["copy_bytes_per_s"] * 1e6 for row in rows]
        axes.plot(tokens, floor, "k_", label="memory floor")
        axes.set(xscale="log", yscale="log", title=f"{hk}/{hv} heads", xlabel="tokens of a call")
    panels = list(figure.axes)
    panels[0].legend(fontsize=7)
    panels[0].set_ylabel("device time, us")
    figure.suptitle(f"Whole GDN prefill, {found['provenance']['gpu']}")
    figure.savefig(path, dpi=120)
    print(f"{path} drawn")
