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
    """Counts ``advance`` calls towards ``total`` megabytes; use as a context manager."""

    def __init__(self, label: str, total_mb: float, log: Log) -> None:
        self._label, self._total, self._log = label, max(total_mb, 1e-9), log
        self._done = 0.0
        self._start = self._last = time.monotonic()
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._label, total=self._total)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, megabytes: float) -> None:
        """Adds work done."""
        self._done += megabytes
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done)
            return
        now = time.monotonic()
        if now - self._last >= QUIET_SECONDS:
            self._last = now
            rate = self._done / (now - self._start)
            left = max(self._total - self._done, 0.0) / max(rate, 1e-9)
            self._log(f"{self._label}: {self._done:.1f}/{self._total:.1f} MB, {rate:.1f} MB/s, {left:.0f} s left")
