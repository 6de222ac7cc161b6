"""SGLang's own benchmark client, imported once for many measurements.

    python -m benchmarks.serve_client

Reads one JSON list of command-line words a line, runs the client with them, prints one JSON line:
``{"ttfts": [s], "input_throughput": tokens/s, "completed": n, "errors": [...]}``, or
``{"error": ...}``.
Its start takes 10 to 25 s, a measurement often less than one.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import io
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

MODULE = "sglang.benchmark.serving"
KEPT = ("ttfts", "input_throughput", "completed", "errors")


def run(client: Any, words: list[str]) -> dict[str, Any]:
    """Run the client's command line; its report goes to a file that is read back."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.jsonl"
        sys.argv = ["bench_serving", *words, "--output-file", str(out), "--output-details"]
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                client.cli_main()
            found = json.loads(out.read_text().splitlines()[-1])
        except (Exception, SystemExit) as error:
            tail = said.getvalue().strip().splitlines()[-3:]
            return {"error": f"{type(error).__name__}: {error}; {' | '.join(tail)}"}
    return {name: found[name] for name in KEPT}


def stand_in_for_datasets() -> None:
    """SGLang's client imports ``datasets`` for MMMU, which is not measured here."""
    if importlib.util.find_spec("datasets") is None:
        module = types.ModuleType("datasets")
        module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
        vars(module)["load_dataset"] = None
        sys.modules["datasets"] = module


def main() -> None:
    """Answer measurements until the input ends."""
    stand_in_for_datasets()
    with contextlib.redirect_stdout(sys.stderr):
        client = importlib.import_module(MODULE)
    print(json.dumps({"ready": MODULE}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(client, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
