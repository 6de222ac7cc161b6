"""The report's figures, from the content of report.json."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure


def forest(content: dict[str, Any], main: dict[str, Any]) -> Figure | None:
    """Change of the accuracy with its interval, by task and pooled, beside the margin."""
    if not main["accuracy"]:
        return None
    rows = [(row["task"], row["n"], row["accuracy"]) for row in main["tasks"] if "accuracy" in row]
    rows.append(("all documents", main["accuracy"]["n"], main["accuracy"]))
    margin = content["margins"]["accuracy"]
    figure = Figure(figsize=(7, 1.2 + 0.32 * len(rows)))
    axes = figure.subplots()
    axes.axvspan(-100 * margin, 100 * margin, color="0.9", label="margin")
    axes.axvline(0, color="0.5", lw=0.8)
    for y, (_, _, bound) in enumerate(reversed(rows)):
        value, low, high = (100 * bound[key] for key in ("value", "low", "high"))
        axes.plot([low, high], [y, y], color="C0", lw=1.6)
        axes.plot(value, y, "o", color="C0", ms=5)
    names = [f"{name} (n = {n})" for name, n, _ in reversed(rows)]
    axes.set_ylim(-0.8, len(rows) - 0.4)
    axes.set_yticks(range(len(rows)), names)
    axes.set_xlabel("change of the accuracy, percentage points, 90 % interval")
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    return figure


def rows(content: dict[str, Any], main: dict[str, Any]) -> Figure | None:
    """Mean |change of the log-likelihood| by position in the chunk, a comparison and repeats."""
    if main["name"] not in content["by_row"]:
        return None
    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    for name, values in content["by_row"].items():
        if name != main["name"] and not name.startswith("repeat"):
            continue
        y = np.array([np.nan if v is None else v for v in values])
        label, alpha = f"{main['baseline']} against {main['candidate']}", 1.0
        if name != main["name"]:
            label, alpha = f"{name.removeprefix('repeat ')} again", 0.7
        axes.plot(y, "-", marker=".", lw=1, label=label, alpha=alpha)
    axes.set_xlabel("position of the token in its chunk of 64")
    axes.set_ylabel("mean |change| of the\nlog-likelihood, nats")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    return figure
