"""What every benchmark does with its results: the file, the plot beside it, the error in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def write(out: Path, found: dict[str, Any]) -> None:
    """Write the JSON of a run."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


def figure(path: Path, width: float, height: float) -> Any:
    """An empty figure, to be saved to ``path``; None without matplotlib, which is said."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} not drawn: matplotlib is not installed")
        return None
    return Figure(figsize=(width, height), layout="constrained")


def save(made: Any, path: Path, dpi: int) -> None:
    made.savefig(path, dpi=dpi)
    print(f"{path} drawn")


def rel_err(x: torch.Tensor, ref: torch.Tensor) -> float:
    """Relative Frobenius error. NaN if x has a NaN: then nothing counts as accurate."""
    import torch  # not needed to measure servers or to write tables

    norm = torch.linalg.vector_norm(x.double() - ref) / torch.linalg.vector_norm(ref)
    return float(f"{norm.item():.4g}")
