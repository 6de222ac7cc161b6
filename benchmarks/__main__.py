"""`python -m benchmarks intra | prefill | methods | resources | serve | tables`."""

from __future__ import annotations

import argparse
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
    prefill.add_argument("--out", type=Path, help="default: prefill[-short]-h200.json")
    prefill.add_argument("--short", action="store_true", help="calls of 1 to 1024 tokens")
    methods = commands.add_parser("methods", help="the whole layer by method of the inverse")
    methods.add_argument("--out", type=Path, default=RESULTS / "methods-h200.json")
    for peers in (prefill, methods):
        peers.add_argument("--sglang", metavar="FOLDER", help="holds the package sglang")
        peers.add_argument("--sglang-release", metavar="X.Y.Z", help="its release, for the record")
        peers.add_argument("--flashinfer", action="store_true", help="measure the installed one")
        peers.add_argument("--rounds", type=int, default=20, help="timed calls each (default: 20)")
    resources = commands.add_parser("resources", help="compile for every architecture, no GPU")
    resources.add_argument("--out", type=Path, default=RESULTS / "resources.json")
    _serve_options(commands.add_parser("serve", help="whole servers: time to first token"))
    commands.add_parser("tables", help="write docs/performance.md from the results")
    arguments = parser.parse_args()
    if arguments.command == "tables":
        from benchmarks import report

        PERFORMANCE.write_text(report.performance(RESULTS))
        print(f"{PERFORMANCE.relative_to(ROOT)} written")
        return 0
    if arguments.command == "resources":
        return _resources(arguments.out)
    if arguments.command == "serve":
        return _serve(parser, arguments)
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

        cases, name = (layer.SHORT, "-short") if arguments.short else (layer.CASES, "")
        out = arguments.out or RESULTS / f"prefill{name}-h200.json"
        return layer.main(
            out, cases, arguments.sglang, arguments.sglang_release, arguments.flashinfer,
            arguments.rounds,
        )  # fmt: skip
    if arguments.command == "methods":
        from benchmarks import methods as by_method

        return by_method.main(
            arguments.out, arguments.sglang, arguments.sglang_release, arguments.flashinfer,
            arguments.rounds,
        )  # fmt: skip
    from benchmarks import intra as measurement

    return measurement.main(
        arguments.out, arguments.sglang, arguments.fla, arguments.sglang_release, arguments.rounds,
        arguments.only, not arguments.no_compile,
    )  # fmt: skip


def _serve_options(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--out", type=Path, default=RESULTS / "serve-h200.json")
    serve.add_argument("--model", action="append", help="default: qwen3.5-4b; may be repeated")
    serve.add_argument("--arms", default="triton,flashinfer,intra,full")
    serve.add_argument("--lengths", default="2048,8192,32768", help="prompt tokens")
    serve.add_argument("--concurrency", default="1,16", help="requests at once")
    serve.add_argument("--rounds", type=int, default=3, help="measurements each (default: 3)")
    serve.add_argument("--requests", type=int, default=4, help="in one, at concurrency 1")
    serve.add_argument("--minutes", type=float, default=60, help="start no model after so long")
    serve.add_argument("flags", nargs="*", metavar="-- FLAG", help="SGLang's, for every arm")


def _serve(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from benchmarks import serve, serve_models

    plans = []
    for model in arguments.model or ["qwen3.5-4b"]:
        if model not in serve_models.SHAPES:
            parser.error(f"--model: want one of {', '.join(serve_models.SHAPES)}, got {model}")
        arms = tuple(arguments.arms.split(","))
        if not set(arms) <= serve.ARMS.keys():
            parser.error(f"--arms: want some of {','.join(serve.ARMS)}, got {arguments.arms}")
        numbers = {}
        for option in ("lengths", "concurrency"):
            words = getattr(arguments, option).split(",")
            if not all(word.isdigit() and int(word) for word in words):
                parser.error(f"--{option}: want numbers above 0, got {getattr(arguments, option)}")
            numbers[option] = tuple(map(int, words))
        for option in ("rounds", "requests"):
            if getattr(arguments, option) < 1:
                parser.error(f"--{option}: want 1 or more, got {getattr(arguments, option)}")
            numbers[option] = getattr(arguments, option)
        plans.append(serve.Plan(model, arms, flags=tuple(arguments.flags), **numbers))
    return serve.main(plans, arguments.out, arguments.minutes)


def _resources(out: Path) -> int:
    import multiprocessing
    import os
    import tempfile
    from concurrent.futures import ProcessPoolExecutor

    import triton

    from benchmarks import output, report
    from benchmarks.resources import ARCHITECTURES, compile_kernel, names

    jobs = [(name, arch) for arch in ARCHITECTURES for name in names(arch)]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as empty:  # what was compiled before would take no time
        os.environ["TRITON_CACHE_DIR"] = empty
        with ProcessPoolExecutor(os.cpu_count(), context) as pool:
            compiled = pool.map(compile_kernel, *zip(*jobs, strict=True))
            rows = [resources.as_dict() for resources in compiled]
    found = {"triton": triton.__version__, "rows": rows}
    output.write(out, found)
    print(report.resources(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
