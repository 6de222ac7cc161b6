"""Tables of the study, and the page that shows them."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from sglang_trinv.reference.methods import METHODS
from sglang_trinv.study.measure import METRICS

TEMPLATE = Path(__file__).with_name("report.html.jinja")
KEYS = ["kind", "method", "precision", "n", "family"]
FAMILIES = {
    "hard": "Hard inputs, inside the bound",
    "outside": "Outside the bound",
    "real gates": "Real gates, near-equal keys",
    "tiny model": "Keys and gates of the embedded model",
    "paper": "The paper's matrices, uniform [0, 1/2)",
}
LOSS = 4e-3  # an entry rounded to bfloat16; a result that errs more is marked


def summary(study: pd.DataFrame) -> pd.DataFrame:
    """The worst of each metric over the inputs of a family, and which input was worst."""
    groups = study.groupby(KEYS, sort=False)
    worst = groups[list(METRICS)].max()
    at = study.loc[groups["rel_fro"].idxmax(), [*KEYS, "input"]].set_index(KEYS)["input"]
    return worst.assign(worst_input=at).reset_index()


def pivot(study: pd.DataFrame, n: int, family: str, metric: str) -> pd.DataFrame:
    """Methods down, precisions across, the worst of the metric."""
    chosen = study[(study.n == n) & (study.family == family)]
    name = chosen.method.where(chosen.kind == "emulated", chosen.method + " (compiled)")
    order = list(dict.fromkeys(name))
    return chosen.assign(name=name).pivot_table(
        index="name", columns="precision", values=metric, aggfunc="max", sort=False
    ).reindex(order)  # fmt: skip


def number(x: float) -> str:
    """An error for a table."""
    if x is None or math.isnan(x):
        return ""
    return "inf" if math.isinf(x) else f"{x:.1e}"


def shade(x: float) -> str:
    """CSS class of an error: as good as bfloat16, up to a tenth, worse."""
    if math.isnan(x):
        return ""
    return "good" if x <= LOSS else "fair" if x <= 0.1 else "bad"


def write(
    out: Path,
    about: dict[str, Any],
    study: pd.DataFrame,
    model: pd.DataFrame,
    served: pd.DataFrame,
    pictures: dict[str, Path],
) -> Path:
    """Write report.html, one page without links to other files; ``pictures``: caption -> PNG."""
    images = [
        (caption, base64.b64encode(path.read_bytes()).decode())
        for caption, path in pictures.items()
    ]
    tables = [
        (f"{title}: {label}, n = {n}", pivot(study, n, family, metric))
        for n in sorted(study.n.unique(), key=lambda n: (n != 64, n))
        for family, title in FAMILIES.items()
        for metric, label in (("rel_fro", "error of the inverse"), ("layer", "error of the output"))
        if ((study.n == n) & (study.family == family) & np.isfinite(study[metric])).any()
    ]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text()).render(
        about=about, images=images, tables=tables, model=model, served=served,
        methods=METHODS.values(), number=number, shade=shade,
        isnan=lambda x: isinstance(x, float) and math.isnan(x),
    )  # fmt: skip
    path = out / "report.html"
    path.write_text(page)
    return path
