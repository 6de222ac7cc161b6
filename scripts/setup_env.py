"""Make .venv for `make demo`, `serve`, `eval` and `test`; skip every step that is done.

    python3 scripts/setup_env.py [run|eval|test|docs]

Standard library only: the machine has nothing but Python, make and git. A step is done
if its stamp holds the hash of what went into it, so a change of the pins installs again by itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

LEAST_PYTHON = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMPS = VENV / ".sglang-trinv"
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input", "install")
PINS = "requirements/cpu.txt"
TAIL_LINES = 25
TELL_EVERY_S = 10.0


class Step:
    """One pip call, and the files whose content decides whether it is needed."""

    def __init__(self, name: str, why: str, arguments: tuple[str, ...], inputs: tuple[str, ...]):
        self.name = name
        self.why = why
        self.arguments = arguments
        self.inputs = inputs

    def digest(self, before: str) -> str:
        """Hash of the step, its inputs and the steps before it."""
        total = hashlib.sha256(repr((before, sys.version_info[:2], self.arguments)).encode())
        for name in self.inputs:
            path = ROOT / name
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            for file in files:
                if file.suffix in (".py", ".toml", ".txt", ".pth"):
                    total.update(file.read_bytes())
        return total.hexdigest()


def steps(goal: str, cuda: bool) -> list[Step]:
    """The steps of a machine with or without CUDA."""
    test = Step("test tools", "pytest, hypothesis, ruff",
                ("--no-deps", "-r", "requirements/test.txt"),
                ("requirements/test.txt",))  # fmt: skip
    evals = Step("evals", "lm-eval, statistics, plots",
                 ("--no-deps", "-r", "requirements/evals.txt"),
                 ("requirements/evals.txt",))  # fmt: skip
    ours = ("--no-deps", "--no-build-isolation", "-e", ".")
    if cuda:
        found = [
            Step("sglang", "SGLang with its GPU kernels, several GB",
                 ("-r", "requirements/cuda.txt"), ("requirements/cuda.txt",)),
            Step("sglang-trinv", "this project", ours, ("pyproject.toml",)),
        ]  # fmt: skip
    else:
        platform = ("--force-reinstall", "./serve/cpu_platform")
        found = [
            Step("torch", "first and alone",
                 ("-r", "requirements/torch.txt", "-c", PINS), ("requirements/torch.txt",)),
            Step("requirements", "what SGLang imports",
                 ("-r", PINS), (PINS,)),
            Step("sglang", "SGLang, torchvision, xgrammar without dependencies",
                 ("--no-deps", "-r", "requirements/sglang-cpu.txt"),
                 ("requirements/sglang-cpu.txt",)),
            Step("sglang-trinv", "this project and its CPU platform",
                 (*ours, *platform), ("pyproject.toml", "serve/cpu_platform")),
        ]  # fmt: skip
    docs = Step("docs", "mkdocs-material, mkdocstrings",
                ("--no-deps", "-r", "requirements/docs.txt"),
                ("requirements/docs.txt",))  # fmt: skip
    more = {"run": [], "eval": [evals], "test": [evals, test], "docs": [docs]}
    return [*found, *more[goal]]


def main() -> int:
    """Bring .venv up to date; return the exit code."""
    goal = sys.argv[1] if len(sys.argv) > 1 else "run"
    if sys.version_info < LEAST_PYTHON:
        return with_newer_python()
    make_venv()
    STAMPS.mkdir(exist_ok=True)
    with (STAMPS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return install(steps(goal, has_cuda()))


def install(todo: list[Step]) -> int:
    """Run the steps that are not done."""
    before = ""
    for i, step in enumerate(todo, 1):
        digest = before = step.digest(before)
        stamp = STAMPS / step.name.replace(" ", "-")
        if stamp.is_file() and stamp.read_text() == digest:
            continue
        if not run(f"[{i}/{len(todo)}] {step.name}: {step.why}", step, stamp.with_suffix(".log")):
            return 1
        stamp.write_text(digest)
    return 0


def run(title: str, step: Step, log: Path) -> bool:
    """Call pip, showing what it does; on failure print the end of its output."""
    start = time.monotonic()
    with log.open("wb") as output:
        pip = subprocess.Popen(
            [str(PYTHON), *PIP, *step.arguments], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
        follow(title, pip, log, start)
    seconds = time.monotonic() - start
    if pip.returncode == 0:
        say(f"{title}  done in {seconds:.0f} s", end="\n")
        return True
    say(f"{title}  FAILED after {seconds:.0f} s; the end of {log}:", end="\n")
    print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]), file=sys.stderr)
    return False


def follow(title: str, pip: subprocess.Popen[bytes], log: Path, start: float) -> None:
    """Show pip's latest line: in a terminal all the time, elsewhere every ten seconds."""
    done = threading.Event()
    threading.Thread(target=lambda: (pip.wait(), done.set()), daemon=True).start()
    terminal, told = sys.stdout.isatty(), start
    if not terminal:
        say(title, end="\n")
    while not done.wait(0.5):
        now = time.monotonic()
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        latest = next((x.strip() for x in reversed(lines) if not x.startswith("WARNING")), "")[:60]
        if terminal:
            say(f"{title}  {now - start:.0f} s  {latest}")
        elif now - told >= TELL_EVERY_S:
            told = now
            say(f"  {now - start:.0f} s  {latest}", end="\n")


def say(text: str, end: str = "") -> None:
    """Print one line; in a terminal over the one before."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        print(f"\r\033[K{text[: width - 1]}", end=end, flush=True)
    else:
        print(text, end=end, flush=True)


def make_venv() -> None:
    """Create .venv unless it is there."""
    if PYTHON.exists():
        return
    say(f"[0] .venv with Python {sys.version.split()[0]}", end="\n")
    done = subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=False)
    if done.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        sys.exit("python3 -m venv failed: on Debian and Ubuntu it is in the package python3-venv")


def has_cuda() -> bool:
    """Whether NVIDIA's driver answers."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def with_newer_python() -> int:
    """Run again with a Python that is new enough, if there is one."""
    for minor in range(14, LEAST_PYTHON[1] - 1, -1):
        python = shutil.which(f"python3.{minor}")
        if python and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            os.execv(python, [python, *sys.argv])
    print(f"want Python 3.11 or newer, got {sys.version.split()[0]}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
