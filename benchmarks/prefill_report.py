"""Table and plot of the whole prefill, out of the JSON of a run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks import output
from benchmarks.cases import spell
from sglang_trinv import prefill

Row = dict[str, Any]
Call = dict[str, Row]  # implementation -> its row
PEERS = {"sglang": "Triton", "flashinfer": "FlashInfer"}
KINDS = ("device", "wall")
NOTE = """\
The layer as SGLang calls it: q and k unnormalised, the state pool in place, new lengths each time.
Medians in microseconds, 20th and 80th percentile in brackets; device and wall as above, so wall has
a cold start of the host in it. FlashInfer through the steps of SGLang's adapter. Served: who
answers under `SGLANG_TRINV_GDN=auto`, and the device time, where SGLang's choice is Triton and
where it is FlashInfer. Error: the worse one of output and final state against float64. Memory: most
held at once beyond the inputs. Floor: q, k, v, o once at the bandwidth of a copy."""


def title(row: Row) -> str:
    return spell(row["lengths"])


def calls(rows: list[Row]) -> list[Call]:
    """The rows of each call side by side."""
    found: dict[Any, Call] = {}
    for row in rows:
        found.setdefault((tuple(row["lengths"]), row["hk"], row["hv"]), {})[row["impl"]] = row
    return [*found.values()]


def served(call: Call, capability: tuple[int, int] = (9, 0)) -> str:
    """Who auto lets answer in place of each of SGLang's choices, and the time."""
    ours = call["ours"]
    heads, tokens = (ours["hk"], ours["hv"]), sum(ours["lengths"])
    said = []
    for peer, name in PEERS.items():
        choice = {"sglang": "triton"}.get(peer, peer)
        wins = prefill.wins(capability, choice, heads, tokens)
        said.append(f"{'ours' if wins else name} {call['ours' if wins else peer]['median_us']:.0f}")
    return ", ".join(said)


def table(found: Row) -> str:
    lines = [
        "| lengths | Hk/Hv | ours, device | wall | Triton, device | wall | FlashInfer, device "
        "| wall | speed-up over Triton, FlashInfer: device | wall | served | error: ours, Triton, "
        "FlashInfer | memory, MiB | floor, us | goal, us |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for call in calls(found["rows"]):
        ours, three = call["ours"], [call[n] for n in ("ours", *PEERS)]
        cells = [title(ours), f"{ours['hk']}/{ours['hv']}"]
        for row in three:
            cells += [f"{row['median_us']:.0f} [{row['p20_us']:.0f}, {row['p80_us']:.0f}]"]
            cells += [f"{row['wall']['median_us']:.0f}"]
        cells += [", ".join(f"{ratio(call, kind, p):.2f}" for p in PEERS) for kind in KINDS]
        cells += [served(call)]
        cells += [", ".join(_error(row["rel_err"]) for row in three)]
        cells += [", ".join(f"{row['peak_bytes'] / 2**20:.0f}" for row in three)]
        cells += [f"{ours['least_bytes'] / found['copy_bytes_per_s'] * 1e6:.0f}"]
        goal = ours["at_most_us"]
        missed = goal is not None and ours["median_us"] > goal
        cells += ["" if goal is None else f"{goal}{' (missed)' if missed else ''}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n{found['note']}"] if "note" in found else []
    return "\n".join(lines)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def ratio(call: Call, kind: str, peer: str) -> float:
    return _time(call[peer], kind) / _time(call["ours"], kind)


def _time(row: Row, kind: str) -> float:
    return (row if kind == "device" else row["wall"])["median_us"]


def summary(found: Row) -> str:
    """Geometric means, least ratios and errors in sentences."""
    parts = []
    for peer, name in (("sglang", "SGLang's Triton chain"), ("flashinfer", "FlashInfer")):
        said = []
        for kind in KINDS:
            ratios = [ratio(call, kind, peer) for call in calls(found["rows"])]
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
    heads = list(dict.fromkeys((row["hk"], row["hv"]) for row in found["rows"]))
    figure = output.figure(path, 10, 6)
    if figure is None:
        return
    panels = figure.subplots(2, -(-len(heads) // 2), squeeze=False).flat
    for axes, (hk, hv) in zip(panels, heads, strict=False):
        rows = [row for row in found["rows"] if (row["hk"], row["hv"]) == (hk, hv)]
        rows.sort(key=lambda row: (sum(row["lengths"]), len(row["lengths"])))
        for name, marker in (("ours", "o"), ("sglang", "s"), ("flashinfer", "^")):
            own = [row for row in rows if row["impl"] == name]
            tokens = [sum(row["lengths"]) for row in own]
            axes.plot(tokens, [row["median_us"] for row in own], marker, label=name, alpha=0.8)
        floor = [row["least_bytes"] / found["copy_bytes_per_s"] * 1e6 for row in own]
        axes.plot(tokens, floor, "k_", label="memory floor")
        axes.set(xscale="log", yscale="log", title=f"{hk}/{hv} heads", xlabel="tokens of a call")
    panels = list(figure.axes)
    panels[0].legend(fontsize=7)
    panels[0].set_ylabel("device time, us")
    figure.suptitle(f"Whole GDN prefill, {found['provenance']['gpu']}")
    output.save(figure, path, 120)
