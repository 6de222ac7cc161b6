"""The study's figures."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sglang_trinv.errors import TrinvError

mpl.use("Agg")
SHOWN = (
    "VCS",
    "MCS",
    "MCH",
    "MBH",
    "MBH16",
    "MXR16",
    "MXR4",
    "NS6",
    "NS_scaled",
    "Neumann15",
    "FS16",
)
STYLE = {name: (f"C{i % 10}", "os^vDP*X<>h"[i]) for i, name in enumerate(SHOWN)}
TOP = 1e20  # what is not finite is drawn here
SPEED_CASE = {"lengths": [8192], "hk": 16, "hv": 32}
INVERSES = ("kkt_solve", "fwd_intra", "solve_tril")


def draw(
    study: pd.DataFrame, model: pd.DataFrame, served: pd.DataFrame, speed: Path | None, out: Path
) -> dict[str, Path]:
    """Draw every figure that there are numbers for; caption -> file."""
    made = {
        "Error of the inverse on the paper's matrices, uniform [0, 1/2)": (
            "paper.png", by_size(study, "paper", "rel_fro")),
        "Error of the inverse, worst of the hard inputs": (
            "hard.png", by_size(study, "hard", "rel_fro")),
        "Largest relative error of an entry, the paper's matrices: MCH is unstable": (
            "instability.png", by_size(study, "paper", "max_rel")),
        "Error against the growth of the powers, n = 64 (lines: growth times one rounding)": (
            "growth.png", growth(study)),
        "Error of the inverse by input, fp16 products, n = 64": ("inputs.png", heat(study)),
        "Error of the layer's output against that of the inverse, n = 64": (
            "layer.png", layer(study)),
        "The embedded model: what an error of the inverse does to it": (
            "model.png", drift(model)),
        "The embedded model served, one inverse an arm: log-likelihoods and answers of lm-eval": (
            "served.png", drift(served)),
        "Speed against error": ("speed.png", speed_scatter(speed)),
    }  # fmt: skip
    found = {}
    for caption, (name, figure) in made.items():
        if figure is not None:
            figure.savefig(out / name, dpi=80, bbox_inches="tight")
            found[caption] = out / name
    return found


def _drawn(x: pd.Series | np.ndarray, top: float = TOP) -> np.ndarray:
    return np.clip(np.nan_to_num(np.asarray(x, float), nan=top, posinf=top), 1e-18, top)


def by_size(study: pd.DataFrame, family: str, metric: str) -> Figure | None:
    """One panel a precision: the metric against n."""
    chosen = study[(study.family == family) & (study.kind == "emulated")]
    precisions = [p for p in chosen.precision.unique() if p != "tf32rz"]
    if not precisions:
        return None
    columns = min(3, len(precisions))
    figure = Figure(figsize=(3.4 * columns, 2.9 * -(-len(precisions) // columns)))
    axes = figure.subplots(-(-len(precisions) // columns), columns, sharex=True, squeeze=False)
    for ax, precision in zip(axes.flat, precisions, strict=False):
        for name in SHOWN:
            rows = chosen[(chosen.method == name) & (chosen.precision == precision)]
            worst = rows.groupby("n")[metric].max()
            color, marker = STYLE[name]
            ax.plot(worst.index, _drawn(worst), color=color, marker=marker, ms=4, lw=1, label=name)
        ax.set(title=precision, xscale="log", yscale="log")
        sizes = sorted(chosen.n.unique())
        ax.set_xticks(sizes, [str(n) for n in sizes])
        ax.minorticks_off()
    for ax in axes[-1]:
        ax.set_xlabel("n")
    figure.subplots_adjust(wspace=0.3, hspace=0.25)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=6, loc="upper center",
                  bbox_to_anchor=(0.5, -0.02), fontsize=8, frameon=False)  # fmt: skip
    return figure


def growth(study: pd.DataFrame) -> Figure | None:
    """Error of MCH, Newton-Schulz, MXR16 and MBH against ``power_growth``."""
    chosen = study[(study.n == 64) & (study.precision == "fp32") & (study.kind == "emulated")]
    if chosen.empty:
        return None
    figure = Figure(figsize=(6, 3.6))
    ax = figure.subplots()
    for name in ("MCH", "NS6", "MXR16", "MBH"):
        rows = chosen[(chosen.method == name) & (chosen.family != "outside")]
        color, marker = STYLE[name]
        ax.plot(rows.growth, _drawn(rows.rel_fro), marker, color=color, ms=5, label=name)
    x = np.array([1, 1e18])
    ax.plot(x, x * 2.0**-24, color="0.6", lw=1)
    ax.set(xscale="log", yscale="log", xlabel="growth of the powers of A",
           ylabel="error of the inverse, fp32")  # fmt: skip
    ax.legend(fontsize=8, frameon=False)
    return figure


def heat(study: pd.DataFrame) -> Figure | None:
    """Methods and inputs at n = 64."""
    chosen = study[(study.n == 64) & (study.precision == "fp16") & (study.kind == "emulated")]
    if chosen.empty:
        return None
    table = chosen.pivot_table(index="input", columns="method", values="rel_fro", sort=False)
    figure = Figure(figsize=(0.36 * table.shape[1] + 3, 0.2 * table.shape[0] + 1.4))
    ax = figure.subplots()
    image = ax.imshow(np.log10(_drawn(table)), cmap="RdYlBu_r", vmin=-5, vmax=1, aspect="auto")
    ax.set_xticks(range(table.shape[1]), table.columns, rotation=90, fontsize=7)
    ax.set_yticks(range(table.shape[0]), table.index, fontsize=7)
    figure.colorbar(image, label="log10 of the error", fraction=0.03)
    return figure


def layer(study: pd.DataFrame) -> Figure | None:
    """Every input and method: what an error of the inverse does to the layer."""
    chosen = study[(study.n == 64) & (study.family != "paper") & np.isfinite(study.layer)]
    if chosen.empty:
        return None
    figure = Figure(figsize=(6, 3.6))
    ax = figure.subplots()
    for i, (family, rows) in enumerate(chosen.groupby("family", sort=False)):
        ax.plot(_drawn(rows.rel_fro), _drawn(rows.layer), ".", color=f"C{i}", ms=3, label=family)
    ax.plot([1e-8, 1e4], [1e-8, 1e4], color="0.6", lw=1)
    ax.set(xscale="log", yscale="log", xlabel="error of the inverse", ylabel="error of the output")
    ax.set(xlim=(1e-9, 1e6), ylim=(1e-9, 1e6))
    ax.legend(fontsize=8, frameon=False, markerscale=3)
    return figure


def drift(model: pd.DataFrame) -> Figure | None:
    """Log-probabilities and answers against the error of the inverse."""
    if model.empty:
        return None
    rows = model[model.method != "exact"]
    figure = Figure(figsize=(8, 3.4))
    left, right = figure.subplots(1, 2)
    fault = rows.method.str.startswith("fault")
    for ax, metric in ((left, "logprob"), (right, "accuracy")):
        for kind, chosen, marker in (("methods", ~fault, "o"), ("faults", fault, "x")):
            x, y = _drawn(rows.inverse_mean[chosen], 1e9), _drawn(rows[metric][chosen], 1e2)
            ax.plot(x, y, marker, ms=4, label=kind)
        ax.set(xscale="log", xlabel="error of the inverse, mean of the chunks")
    left.set(yscale="log", ylabel="mean |change of log-probability|, nats")
    right.set(ylabel="share of right answers", ylim=(-0.05, 1.05))
    left.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return figure


def speed_scatter(path: Path | None) -> Figure | None:
    """Time against error of every implementation in the JSON of `python -m benchmarks intra`.

    The case of one sequence of 8192 tokens with 16 key and 32 value heads; None without a file.
    """
    if path is None:
        return None
    try:
        rows = [r for r in json.loads(path.read_text())["rows"] if r["op"] in INVERSES]
        rows = [r for r in rows if all(r[k] == v for k, v in SPEED_CASE.items())]
        points = [(_name(r), r["op"], r["median_us"], r["rel_err"]) for r in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise TrinvError(f"--speed: {path}: want the JSON of `benchmarks intra`: {error}") from None
    if not points:
        return None
    figure = Figure(figsize=(4 * len({op for _, op, _, _ in points}), 3.6))
    names = list(dict.fromkeys(op for _, op, _, _ in points))
    for ax, op in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for name, _, time_us, error in (p for p in points if p[1] == op):
            ours = name.startswith("ours")
            ax.plot(time_us, error, "o" if ours else "s", color="C0" if ours else "C1")
            ax.annotate(
                name, (time_us, error), fontsize=7, xytext=(4, 3), textcoords="offset points"
            )
        ax.set(title=f"{op}, 8192 tokens, 16/32 heads", xlabel="device time, us", yscale="log")
        ax.margins(0.25)
    figure.supylabel("worst error of a result")
    figure.tight_layout()
    return figure


def _name(row: dict[str, str]) -> str:
    return " ".join(filter(None, (row["impl"], row["variant"])))
