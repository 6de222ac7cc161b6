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
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from sglang_trinv.serve.config import ServeError

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


class Client:
    """SGLang's benchmark client in a process of its own."""

    def __init__(self) -> None:
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serve_client"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True,
        )  # fmt: skip
        ready = self._read()
        if "error" in ready:
            raise ServeError(f"SGLang's benchmark client: {ready['error']}")

    def _read(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.said.seek(0)
        last = (self.said.read().strip().splitlines() or ["no message"])[-1]
        return {"error": f"ended with status {self.process.wait()}: {last}"}

    def measure(self, words: list[str]) -> dict[str, Any]:
        """What the client measured, or ``{"error": ...}``."""
        try:
            self.process.stdin.write(json.dumps(words) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._read()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


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
