"""`python -m benchmarks intra | prefill | resources | tables`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PERFORMANCE = ROOT / "docs" / "performance.md"


def main() -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    intra = commands.add_parser("intra", help="ours, SGLang and fla on this GPU")
    intra.add_argument("--out", type=Path, default=RESULTS / "intra-h200.json")
    intra.add_argument("--sglang", metavar="FOLDER", help="holds the package sglang")
    intra.add_argument("--sglang-release", metavar="X.Y.Z", help="its release, for the record")
    intra.add_argument("--fla", metavar="FOLDER", help="holds the package fla")
    intra.add_argument("--rounds", type=int, default=50, help="timed calls each (default: 50)")
    intra.add_argument("--only", default="", metavar="OP", help="ops whose name contains this")
    intra.add_argument("--no-compile", action="store_true", help="compile when first called")
    prefill = commands.add_parser("prefill", help="the whole layer: ours, SGLang, FlashInfer")
    prefill.add_argument("--out", type=Path, default=RESULTS / "prefill-h200.json")
    prefill.add_argument("--sglang", metavar="FOLDER", help="holds the package sglang")
    prefill.add_argument("--sglang-release", metavar="X.Y.Z", help="its release, for the record")
    prefill.add_argument("--flashinfer", action="store_true", help="measure the installed one too")
    prefill.add_argument("--rounds", type=int, default=20, help="timed calls each (default: 20)")
    resources = commands.add_parser("resources", help="compile for every architecture, no GPU")
    resources.add_argument("--out", type=Path, default=RESULTS / "resources.json")
    commands.add_parser("tables", help="write docs/performance.md from the results")
    arguments = parser.parse_args()
    if arguments.command == "tables":
        from benchmarks import report

        PERFORMANCE.write_text(report.performance(RESULTS))
        print(f"{PERFORMANCE.relative_to(ROOT)} written")
        return 0
    if arguments.command == "resources":
        return _resources(arguments.out)
    import torch

    if not torch.cuda.is_available():
        parser.error(f"{arguments.command}: want a CUDA GPU, found none")
    if arguments.rounds < 2:
        parser.error(f"--rounds: want 2 or more, got {arguments.rounds}")
    for option in ("sglang", "fla"):
        folder = getattr(arguments, option, None)
        if folder is not None and not (Path(folder) / option).is_dir():
            parser.error(f"--{option}: want a folder that holds the package {option}, got {folder}")
    if arguments.command == "prefill":
        from benchmarks import prefill as layer

        return layer.main(
            arguments.out, arguments.sglang, arguments.sglang_release, arguments.flashinfer,
            arguments.rounds,
        )  # fmt: skip
    from benchmarks import intra as measurement

    return measurement.main(
        arguments.out, arguments.sglang, arguments.fla, arguments.sglang_release, arguments.rounds,
        arguments.only, not arguments.no_compile,
    )  # fmt: skip


def _resources(out: Path) -> int:
    import triton

    from benchmarks import report
    from benchmarks.resources import ARCHITECTURES, KERNELS, compile_kernel

    rows = []
    for name in KERNELS:
        for arch in ARCHITECTURES:
            rows.append(compile_kernel(name, arch).as_dict())
            print(json.dumps(rows[-1]), flush=True)
    found = {"triton": triton.__version__, "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(report.resources(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
