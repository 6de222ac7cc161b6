"""Start SGLang in a process group of its own, watch it, verify it, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from sglang_trinv.serve import health
from sglang_trinv.serve.command import build
from sglang_trinv.serve.config import ServeConfig, ServeError

START_TIMEOUT_S = 1800.0  # a large model from a cold disk; a dead server is noticed at once
STOP_TIMEOUT_S = 15.0
ORPHAN_TIMEOUT_S = 1.0  # for children whose parent is gone
KILL_TIMEOUT_S = 5.0
TAIL_LINES = 15
ERRORS_BEFORE = 3
ERROR = re.compile(r"[\w.]*(Error|Exception|Failed|Interrupt)\b(:|$)")  # ends a traceback
WORKERS = ("sglang::scheduler", "sglang::detokenizer")


class Server:
    """One SGLang server. Use as a context manager: leaving it stops the whole group."""

    def __init__(
        self, config: ServeConfig, run_dir: Path, environ: Mapping[str, str] = os.environ
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.command = build(config, run_dir, environ)
        self.log = run_dir / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.workers: dict[int, str] = {}
        self.seen: set[psutil.Process] = set()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server in a session of its own, its output in ``server.log``."""
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command.argv,
                env=self.command.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def wait_healthy(
        self, timeout_s: float = START_TIMEOUT_S, progress: Callable[[str], None] | None = None
    ) -> float:
        """Wait until ``/health`` answers 200; return the seconds since ``start``.

        Args:
            progress: called about twice a second with the newest line of the log.
        Raises:
            ServeError: the server ended, or takes longer than ``timeout_s``; with its last lines.
        """
        lines, last = self.follow(), ""
        while not health.ready(self.config.url):
            while (line := next(lines)) is not None:
                last = line or last
            if progress:
                progress(last)
            self.check_alive()
            if time.monotonic() - self.started > timeout_s:
                raise ServeError(f"not healthy after {timeout_s:.0f} s\n{self.tail()}")
            time.sleep(0.5)
        self.check_alive()  # something else may answer on the port
        self.workers = {
            p.pid: name for p in self.processes() if (name := _title(p)).startswith(WORKERS)
        }
        return time.monotonic() - self.started

    def check_alive(self) -> None:
        """Raise ServeError if the main process or a worker has ended."""
        assert self.process is not None
        code = self.process.poll()
        if code is not None:
            raise ServeError(f"the server ended with status {code}\n{self.tail()}")
        alive = {p.pid for p in self.processes()}
        for pid, name in self.workers.items():
            if pid not in alive:
                raise ServeError(f"{name} (process {pid}) died\n{self.tail()}")

    def verify(self) -> health.Verdict:
        """What the status files say after one short request.

        Raises:
            ServeError: our kernels were asked for, could run, and are not called.
        """
        verdict = health.verify(self.config, self.run_dir)
        if verdict.kind == "error":
            raise ServeError(verdict.message)
        return verdict

    def wait(self, show: Callable[[str], None]) -> None:
        """Pass on the log until the server ends or loses a process; never returns otherwise."""
        for line in self.follow(from_end=True):
            if line is None:
                self.check_alive()
                time.sleep(0.5)
            else:
                show(line)

    def processes(self) -> list[psutil.Process]:
        """Living processes of the group, the main one and what left the group included."""
        assert self.process is not None
        with contextlib.suppress(psutil.Error):
            main = psutil.Process(self.process.pid)
            self.seen.update([main, *main.children(recursive=True)])
        return [p for p in self.seen if _living(p)]

    def stop(self) -> None:
        """Stop every process: SIGTERM to the main one, then SIGKILL to the group.

        Returns when none is left.
        """
        if self.process is None:
            return
        self.processes()  # remember the children while their parent lives
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)
        if not self._gone(ORPHAN_TIMEOUT_S):
            self._kill()
            self._gone(KILL_TIMEOUT_S)
        self.process.wait(KILL_TIMEOUT_S)

    def follow(self, from_end: bool = False) -> Iterator[str | None]:
        """Lines of the log as they come; None when there is no whole line more for now."""
        with self.log.open(errors="replace") as log:
            if from_end:
                log.seek(0, os.SEEK_END)
            part = ""
            while True:
                part += log.readline()
                if part.endswith("\n"):
                    yield part.rstrip("\n")
                    part = ""
                else:
                    yield None

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of the log, errors before them, long lines cut, and where the rest is.

        When a scheduler dies the main process ends with a traceback of its own; the cause is above.
        """
        text = [line[:300] for line in self.log.read_text(errors="replace").splitlines()]
        causes = dict.fromkeys(line for line in text[:-lines] if ERROR.match(line))
        shown = [*list(causes)[-ERRORS_BEFORE:], *text[-lines:]]
        return "\n".join([*shown, f"(whole log: {self.log})"])

    def _kill(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in self.processes():  # what moved to a group of its own
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _gone(self, timeout_s: float) -> bool:
        assert self.process is not None
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not self.processes() and not _group_lives(self.process.pid):
                return True
            time.sleep(0.1)
        return False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into KeyboardInterrupt, so that every ``finally`` runs."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """Runs in the child: the kernel kills it if we are killed without a chance to clean up.

    SGLang's own children ask for the same towards their parent.
    """
    import ctypes

    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _living(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""


def _group_lives(group: int) -> bool:
    """Whether a process that is no zombie is in ``group``."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False
