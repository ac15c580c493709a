"""What a person sees: one line a step, and on a terminal a progress bar pinned below the lines."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, TextIO

from .registry import MetricValue

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: Steps in the moving window that the remaining time is estimated from.
ETA_WINDOW = 32
#: What a line gives up, in this order, on a terminal that is too narrow for it. The bar below shows the ETA.
NARROWER = ("peak", "eta", "step_ms", "epoch", "lr")


class Console:
    """Prints the progress of one run to ``stream``.

    On a terminal the lines scroll above a progress bar; in a pipe or a file there are plain lines only, each flushed.
    `message` may be called from any thread.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        peak_name: str,
        peak_flops: float,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start after ``start_step`` of ``total_steps``; MFU is shown against ``peak_flops`` FLOP/s, ``peak_name``."""
        self._total = total_steps
        self._peak = f"of {format_flops(peak_flops)} ({peak_name})"
        self._peak_named = False
        self._stream = stream
        self._eta = EtaWindow(total_steps, start_step, clock)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if stream.isatty() and os.environ.get("TERM") != "dumb":
            self._start_bar(start_step)

    def step(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Print the line of ``step`` from its metrics (names of `registry.STEP_METRICS`); absent ones are left out."""
        eta = self._eta.update(step)
        self._write(self._fitting(step, metrics, eta))
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, eta=format_duration(eta))

    def message(self, text: str) -> None:
        """Print ``text`` on lines of its own."""
        self._write(text)

    def close(self) -> None:
        """Remove the progress bar; may be called twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fitting(self, step: int, metrics: Mapping[str, MetricValue], eta: float) -> str:
        line = format_step(step, self._total, metrics, self._peak, eta)
        if self._progress is None or len(line) <= self._progress.console.width:
            return line
        if not self._peak_named:
            self._peak_named = True
            self._write(f"MFU is the share {self._peak}")
        for given_up in range(1, len(NARROWER) + 1):
            line = format_step(step, self._total, metrics, self._peak, eta, NARROWER[:given_up])
            if len(line) <= self._progress.console.width:
                break
        return line

    def _write(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def _start_bar(self, start_step: int) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:5.1f}%"),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("ETA {task.fields[eta]}"),
            console=RichConsole(file=self._stream),
            transient=True,
            expand=True,
        )
        self._task = self._progress.add_task("", total=self._total, completed=start_step, eta="--")
        self._progress.start()


class EtaWindow:
    """Remaining seconds from the last `ETA_WINDOW` steps, so that a slow start soon stops counting."""

    def __init__(self, total_steps: int, start_step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total_steps
        self._clock = clock
        self._seen: deque[tuple[int, float]] = deque([(start_step, clock())], maxlen=ETA_WINDOW + 1)

    def update(self, step: int) -> float:
        """Note that ``step`` has ended; returns the seconds left, NaN where no step was counted."""
        self._seen.append((step, self._clock()))
        (first, since), (last, now) = self._seen[0], self._seen[-1]
        if last <= first:
            return math.nan
        return (now - since) / (last - first) * max(0, self._total - step)


def format_step(
    step: int,
    total: int,
    metrics: Mapping[str, MetricValue],
    peak: str,
    eta_s: float,
    omit: Collection[str] = (),
) -> str:
    """The line of one step; columns keep their width from line to line. ``peak`` follows the MFU.

    ``omit`` names columns to leave out: metrics, ``peak`` or ``eta``.
    """
    width = len(str(total))
    parts = [f"step {step:{width}d}/{total} {100 * step / max(1, total):5.1f}%"]
    for name, render in _COLUMNS.items():
        value = metrics.get(name)
        if isinstance(value, int | float) and name not in omit:
            parts.append(render(float(value)) + (f" {peak}" if name == "mfu" and "peak" not in omit else ""))
    if "eta" not in omit:
        parts.append(f"ETA {format_duration(eta_s)}")
    skipped = metrics.get("skipped_steps", 0)
    if isinstance(skipped, int | float) and skipped:
        parts.append(f"skipped {skipped:.0f}")
    return " | ".join(parts)


#: Metric -> its column, in the order of the line.
_COLUMNS: dict[str, Callable[[float], str]] = {
    "loss": lambda x: f"loss {x:6.3f}",
    "lr": lambda x: f"lr {x:.1e}",
    "step_ms": lambda x: f"{x:5.0f} ms",
    "tokens_per_s": lambda x: f"{format_count(x):>5} tok/s",
    "mfu": lambda x: f"MFU {100 * x:4.1f}%",
    "router_entropy": lambda x: f"h {x:.2f}",
    "epoch": lambda x: f"epoch {x:.2f}",
}


def format_count(value: float) -> str:
    """Three digits and a decimal prefix: 950, 26.4k, 1.20M."""
    for divisor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= divisor * 0.9995:
            return _three_digits(value / divisor) + suffix
    return f"{value:.0f}"


def format_flops(flops: float) -> str:
    """FLOP/s as TF/s with about three digits: 0.32 TF/s, 989 TF/s."""
    return f"{_three_digits(flops / 1e12)} TF/s"


def _three_digits(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}"


def format_duration(seconds: float) -> str:
    """Two units at most, of even width: `    42s`, ` 1m 27s`, ` 3h 05m`, `12d 04h`; `--` where unknown."""
    if not math.isfinite(seconds):
        return f"{'--':>7}"
    whole = round(seconds)
    for big, small, size in (("d", "h", 86400), ("h", "m", 3600), ("m", "s", 60)):
        if whole >= size:
            return f"{whole // size:2d}{big} {whole % size // (size // (24 if big == 'd' else 60)):02d}{small}"
    return f"{whole:>6d}s"
