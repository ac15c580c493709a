"""Progress of a long step: a bar on a terminal, a line every few seconds in a pipe, silence for a short step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

Log = Callable[[str], object]
#: Steps shorter than this say nothing; a pipe gets a line this often (seconds).
QUIET_SECONDS = 5.0


class Progress:
    """Counts ``advance`` calls towards ``total`` of a unit ("tasks" are whole numbers); use as a context manager."""

    def __init__(self, label: str, total: float, log: Log, unit: str = "MB") -> None:
        self._label, self._total, self._log, self._unit = label, max(total, 1e-9), log, unit
        self._done = 0.0
        self._start = self._last = time.monotonic()
        self._terminal = False
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        self._terminal = sys.stderr.isatty()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: float) -> None:
        """Adds work done."""
        self._done += amount
        self.tick()

    def tick(self) -> None:
        """Shows how things stand if it is time to; call it while waiting: a slow task must not look like a halt."""
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, state=self._state(now))
        elif now - self._last >= QUIET_SECONDS:
            self._last = now
            if self._terminal:
                self._open_bar(now)
            else:
                self._log(f"{self._label}: {self._state(now)}")

    def _state(self, now: float) -> str:
        """Done of total, rate and time left."""
        rate = self._done / max(now - self._start, 1e-9)
        left = f"{max(self._total - self._done, 0.0) / rate:.0f} s left" if rate > 0 else "no estimate yet"
        digits = 0 if self._unit == "tasks" else 1
        return f"{self._done:.{digits}f}/{self._total:.{digits}f} {self._unit}, {rate:.1f} {self._unit}/s, {left}"

    def _open_bar(self, now: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(self._label, total=self._total, state=self._state(now))
        self._bar.update(self._task, completed=self._done)
        self._bar.start()
