"""Table, goals and plot out of the JSON of `python -m benchmarks serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import output

Row = dict[str, Any]
STOCK = ("triton", "flashinfer")
# Time to first token at 8192 tokens, one request, against stock with Triton kernels: at most this.
GOAL_TOKENS = 8192
GOALS = {"intra": 0.985, "full": 0.94}
NOTE = """\
Servers of all arms side by side on one GPU, asked in turns by SGLang's own benchmark client;
weights filled by SGLang (`--load-format dummy`), radix cache off, random tokens, one new token.
Medians in milliseconds, 20th and 80th percentile in brackets. "of Triton": time to first token over
that of stock with Triton kernels, "of the better stock": over the smaller of both."""


def table(found: dict[str, Any]) -> str:
    """A Markdown table: every row beside stock's of the same case."""
    lines = [
        "| model | prompt tokens | at once | arm | time to first token, ms | of Triton "
        "| of the better stock | prefill tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        head = [row["model"], str(row["prompt_tokens"]), str(row["concurrency"]), row["arm"]]
        if "error" in row:
            lines.append(f"| {' | '.join([*head, row['error'], '', '', ''])} |")
            continue
        ttft = row["ttft_ms"]
        peers = stock(found["rows"], row)
        triton = ratio(row, [r for r in peers if r["arm"] == "triton"])
        cells = [
            f"{ttft['median']:.1f} [{ttft['p20']:.1f}, {ttft['p80']:.1f}]",
            _shown(triton) + _missed(row, triton),
            _shown(ratio(row, peers)),
            str(row["prefill_tokens_per_s"]),
        ]
        lines.append(f"| {' | '.join([*head, *cells])} |")
    for model, arms in found["absent"].items():
        lines += [f"\nNot served: {model} {arm}: {why}" for arm, why in arms.items()]
    lines += [f"\n{found['note']}"] if "note" in found else []
    return "\n".join(lines) + profiles(found)


def heading(found: dict[str, Any]) -> str:
    """What was measured: the GPU and SGLang's flags that every arm had."""
    flags = dict.fromkeys(" ".join(f) for f in found["flags"].values())
    return ", ".join([f"Servers: {found['provenance']['gpu']}", *(f"`{f}`" for f in flags if f)])


def profiles(found: dict[str, Any]) -> str:
    """A Markdown table of the GPU's time in one prefill of each arm, empty without profiles."""
    lines = []
    for model, arms in found["profiles"].items():
        for arm, profile in arms.items():
            if "error" in profile:
                cells = [profile["error"], "", ""]
            else:
                total, gdn = profile["kernels_ms"], profile["gdn_ms"]
                cells = [f"{total:.2f}", f"{gdn:.2f}", f"{gdn / total:.1%}"]
            lines.append(f"| {' | '.join([model, arm, *cells])} |")
    if not lines:
        return ""
    head = f"""

One prefill of {found["profiled_tokens"]} tokens under SGLang's profiler, milliseconds of the GPU;
"GDN" is what the arms compute differently, from the gates' sums and the keys' norms to the output.
Kernels that run beside each other, as the scores and the state pass of `full`, count each in full.

| model | arm | all kernels | GDN | share |
|---|---|---|---|---|
"""
    return head + "\n".join(lines)


def stock(rows: list[Row], row: Row) -> list[Row]:
    """Stock's rows of the same case."""
    case = ("model", "prompt_tokens", "concurrency")
    return [
        r for r in rows
        if r["arm"] in STOCK and "error" not in r and all(r[n] == row[n] for n in case)
    ]  # fmt: skip


def ratio(row: Row, peers: list[Row]) -> float | None:
    """Median time to first token over the smallest of ``peers``; None without peers."""
    if not peers:
        return None
    return row["ttft_ms"]["median"] / min(peer["ttft_ms"]["median"] for peer in peers)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _missed(row: Row, value: float | None) -> str:
    goal = GOALS.get(row["arm"])
    here = (row["prompt_tokens"], row["concurrency"]) == (GOAL_TOKENS, 1)
    if goal is None or value is None or not here:
        return ""
    return f" (goal {goal}{'' if value <= goal else ', missed'})"


def plot(found: dict[str, Any], path: Path) -> None:
    """Write time to first token over stock with Triton kernels, one request, by prompt length."""
    rows = [r for r in found["rows"] if r["concurrency"] == 1 and "error" not in r]
    models = list(dict.fromkeys(r["model"] for r in rows))
    figure = output.figure(path, 4 * max(1, len(models)), 4)
    if figure is None:
        return
    for axes, model in zip(
        figure.subplots(1, max(1, len(models)), squeeze=False)[0], models, strict=False
    ):
        for arm in dict.fromkeys(r["arm"] for r in rows if r["model"] == model):
            points = []
            for r in rows:
                base = [p for p in stock(rows, r) if p["arm"] == "triton"]
                if (r["model"], r["arm"]) == (model, arm) and base:
                    points.append((r["prompt_tokens"], ratio(r, base)))
            axes.plot(*zip(*points, strict=True), "o-", label=arm) if points else None
        lengths = sorted({r["prompt_tokens"] for r in rows if r["model"] == model})
        axes.set(xscale="log", xlabel="prompt tokens", title=model)
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.set_xticks([], minor=True)
        axes.set_ylabel("time to first token / stock with Triton")
        axes.legend()
    output.save(figure, path, 150)
