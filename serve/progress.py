"""Show that something long goes on: a spinner in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import re
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.status import Status

INTERVAL_S = 10.0
WIDTH = 90
# "[2026-01-31 12:00:00 TP0] " and the like: the elapsed time is already shown
STAMP = re.compile(r"^\[[^\]]*\d\d:\d\d[^\]]*\]\s*")


class Progress:
    """Context manager; ``update`` with the latest thing that was said."""

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self.title = title
        self.status: Status | None = None
        self.start = self.told = 0.0

    def __enter__(self) -> Progress:
        self.start = self.told = time.monotonic()
        if self.console.is_terminal:
            self.status = self.console.status(escape(self.title))
            self.status.start()
        else:
            self.console.print(f"{self.title} ...", markup=False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.status:
            self.status.stop()

    def update(self, line: str) -> None:
        """Show ``line``, the newest of a log, and the time since the start."""
        now = time.monotonic()
        said = STAMP.sub("", line)[:WIDTH]
        text = f"{now - self.start:.0f} s  {said}"
        if self.status:
            self.status.update(f"{escape(self.title)}  [dim]{escape(text)}[/]")
        elif now - self.told >= INTERVAL_S:
            self.told = now
            self.console.print(f"  {text}", markup=False)
