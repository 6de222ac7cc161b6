"""What this process does with the package: state, hooks and counts, one JSON in the run folder.

Counting happens in every prefill layer, so it only adds to a dict under a lock. The file is written
at once when the state changes and at calls 1, 2, 4, 8, ...; the rest is written within a second by
a thread that also follows SGLang's process title, which is set after plugins load. The file is
replaced atomically, so a reader never sees half of one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import setproctitle

logger = logging.getLogger(__name__)

SCHEMA = 1
STATES = ("off", "registered", "installed", "idle", "refused", "failed")
IMPLEMENTATIONS = ("triton", "triton-interpreter", "torch")
WRITE_INTERVAL_S = 1.0
MOST_REASONS = 32  # a reason may name a size, and there are many sizes
OTHER_REASONS = "other reasons"


def role_of(title: str) -> str:
    """``sglang::scheduler_TP0`` -> ``scheduler``; ``main`` for a title not set by SGLang."""
    match = re.match(r"sglang::([a-z][a-z_]*?)(?:_?[A-Z0-9].*)?$", title)
    return match.group(1) if match else "main"


class ProcessStatus:
    """State and counts of one process. Safe to use from several threads."""

    def __init__(self, run_dir: Path | None = None) -> None:
        self.run_dir = run_dir
        self.pid = os.getpid()
        self.hooks: Callable[[], list[dict[str, Any]]] = list
        self.fields: dict[str, Any] = {
            "version": None,
            "release": None,
            "method": None,
            "state": "off",
            "reason": "",
            "layers": {"gdn": None, "kda": None},
            "device": None,
            "sm": None,
            "prefill_backend": None,
            "on_hot_path": False,
            "warmup_s": 0.0,
            "self_check": None,  # of selfcheck.run, once it ran
            "self_check_full": None,  # the same of the whole prefill
            "rank": 0,  # of the torch.distributed world, its size, and what rank 0 heard
            "world": 1,
            "ranks": [],
            "mismatch": "",
        }
        self.calls: dict[str, Counter[str]] = {"fwd_intra": Counter()}
        self.fallbacks: Counter[str] = Counter()
        self.check: dict[str, Any] = {
            "wanted": 0,
            "done": 0,
            "skipped": 0,
            "disagreements": 0,
            "non_finite": 0,
            "worst": {"w": 0.0, "u": 0.0},  # distance to stock's result
            "worst_error": {"ours": {"w": 0.0, "u": 0.0}, "stock": {"w": 0.0, "u": 0.0}},
            "worst_ratio": 0.0,  # of our error to the tolerance below; above 1 is a disagreement
            "tolerance": 0.0,
        }
        self._lock = threading.RLock()
        self._dirty = threading.Event()
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._total = 0
        self._unwritable = False

    def update(self, **fields: Any) -> None:
        """Set fields of the file by name and write it."""
        unknown = fields.keys() - self.fields.keys()
        assert not unknown, f"no such status field: {sorted(unknown)}"
        with self._lock:
            self.fields.update(fields)
        self.write()
        self._follow()

    def count_call(self, op: str, implementation: str) -> None:
        """Count one call of ``op`` that ``implementation`` answered."""
        with self._lock:
            self.calls.setdefault(op, Counter())[implementation] += 1
            self._total += 1
            due = self._total & (self._total - 1) == 0
        self._changed(due)

    def count_fallback(self, reason: str) -> int:
        """Count one call that stock answered, and return how often ``reason`` has been seen."""
        with self._lock:
            if reason not in self.fallbacks and len(self.fallbacks) >= MOST_REASONS:
                reason = OTHER_REASONS
            self.fallbacks[reason] += 1
            seen = self.fallbacks[reason]
        self._changed(seen & (seen - 1) == 0)
        return seen

    def record_check(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Apply ``change`` to the totals of the checks and write the file."""
        with self._lock:
            change(self.check)
        self.write()

    def to_dict(self) -> dict[str, Any]:
        """The content of the file; whether the hooks are live is looked up now."""
        title = setproctitle.getproctitle()
        with self._lock:
            calls = {
                op: {name: counts[name] for name in IMPLEMENTATIONS}
                for op, counts in self.calls.items()
            }
            return {
                "schema": SCHEMA,
                "pid": self.pid,
                "started": psutil.Process(self.pid).create_time(),
                "role": role_of(title),
                # Only SGLang's own title: a command line may hold an API key.
                "title": title if role_of(title) != "main" else "",
                **self.fields,
                "hooks": self.hooks(),
                "calls": calls,
                "fallbacks": dict(self.fallbacks),
                "check": json.loads(json.dumps(self.check)),
                "updated": datetime.now(UTC).isoformat(timespec="milliseconds"),
            }

    def write(self) -> None:
        """Replace this process's file. A folder that cannot be written costs one warning."""
        if self.run_dir is None or os.getpid() != self.pid:
            return
        with self._lock:
            self._dirty.clear()
            content = self.to_dict()
            path = self.run_dir / f"{content['role']}-{self.pid}.json"
            try:
                if self._path is None:
                    self.run_dir.mkdir(parents=True, exist_ok=True)
                elif not self.run_dir.is_dir():
                    return  # removed by the one who made it: nobody reads it any more
                _replace(path, json.dumps(content, indent=1))
                if self._path not in (None, path):
                    self._path.unlink(missing_ok=True)
                self._path = path
            except OSError as error:
                if not self._unwritable:
                    logger.warning("sglang_trinv: status not written: %s", error)
                self._unwritable = True

    def _changed(self, due: bool) -> None:
        if self.run_dir is None or self._unwritable:
            return
        if due:
            self.write()
        else:
            self._dirty.set()

    def _follow(self) -> None:
        """Start the thread that writes what changed, once; a second process needs its own."""
        if self.run_dir is None or self._thread is not None:
            return
        atexit.register(self.write)
        self._thread = threading.Thread(target=self._run, name="trinv-status", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pause = WRITE_INTERVAL_S
        while not self._unwritable:
            changed = self._dirty.wait(timeout=pause)
            retitled = self._path is not None and not self._path.name.startswith(
                role_of(setproctitle.getproctitle()) + "-"
            )
            if changed or retitled:
                self.write()
                time.sleep(WRITE_INTERVAL_S)
            pause = min(2 * pause, 60.0)


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


_process = ProcessStatus()


def current() -> ProcessStatus:
    """The status of this process."""
    return _process


def reset(run_dir: Path | None = None) -> ProcessStatus:
    """Start this process's status afresh: in a forked child, and in tests."""
    global _process
    _process = ProcessStatus(run_dir)
    return _process


os.register_at_fork(after_in_child=lambda: reset(_process.run_dir))


def read_run_dir(path: Path | str) -> list[dict[str, Any]]:
    """Read the status files of a run, newest first, each with ``alive`` and ``file`` added.

    A file that is not one of ours is left out; a process is alive if its pid exists, is no zombie
    and was started when the file says (a pid is reused after a while).
    """
    found = []
    for file in Path(path).glob("*.json"):
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            continue
        content["alive"] = _alive(content.get("pid"), content.get("started"))
        content["file"] = str(file)
        found.append(content)
    return sorted(found, key=lambda content: str(content.get("updated")), reverse=True)


def _alive(pid: Any, started: Any) -> bool:
    try:
        process = psutil.Process(int(pid))
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return started is None or abs(process.create_time() - float(started)) < 2.0
    except (psutil.Error, TypeError, ValueError):
        return False
