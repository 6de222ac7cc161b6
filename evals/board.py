"""Progress of arms that run side by side: a table in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

INTERVAL_S = 15.0
WIDTH = 90


class Board:
    """Context manager; ``tell`` may be called from any thread."""

    def __init__(self, console: Console, names: list[str]) -> None:
        self.console = console
        self.said = dict.fromkeys(names, "waits")
        self.lock = threading.Lock()
        self.start = self.told = time.monotonic()
        self.live: Live | None = None

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self.live = Live(self._table(), console=self.console, refresh_per_second=2)
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            self.live.stop()

    def tell(self, name: str, text: str, final: bool = False) -> None:
        """Show ``text`` for an arm; ``final`` lines are always printed."""
        with self.lock:
            self.said[name] = text[:WIDTH]
            if self.live:
                self.live.update(self._table())
                return
            now = time.monotonic()
            if final or now - self.told >= INTERVAL_S:
                self.told = now
                shown = {name: text} if final else self.said
                for arm, line in shown.items():
                    self.console.print(f"{now - self.start:5.0f} s  {arm:20} {line}", markup=False)

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, text in self.said.items():
            table.add_row(name, text)
        return table
