"""The hub: training calls `Telemetry.log` once a step; a slow, full or broken sink never stops it.

`metrics.jsonl` and `eval.jsonl` are written on the calling thread (some ten microseconds): the line of a step is with
the operating system before that step's checkpoint can be, so after any kill the log reaches at least as far as the
newest checkpoint. Each optional sink has a background thread and a bounded queue of its own, so one that hangs delays
neither training nor the others.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CapabilityError, OutputError
from .registry import EVAL_METRICS, STEP_METRICS, MetricValue
from .sinks.base import Sink
from .sinks.jsonl import JsonlWriter, rewind_jsonl
from .sinks.tensorboard import TensorBoardSink
from .sinks.wandb import WandbSink

METRICS_FILE = "metrics.jsonl"
EVAL_FILE = "eval.jsonl"
#: Records an optional sink may lag behind before its oldest are dropped.
QUEUE_RECORDS = 1024

_Job = tuple[int, float, str, Mapping[str, MetricValue]]
Warn = Callable[[str], None]


class Telemetry:
    """Metric log of one run, owned by the rank that logs."""

    def __init__(
        self,
        run_dir: Path,
        *,
        tensorboard: bool,
        wandb: bool,
        config: Mapping[str, Any],
        config_hash: str = "unknown",
        resume_step: int = 0,
        warn: Warn | None = None,
        extra_sinks: Sequence[Sink] = (),
    ) -> None:
        """Open the logs of ``run_dir`` to go on after ``resume_step`` (0: from the start).

        Records of later steps, left by a run that was killed after its last checkpoint, are set aside. ``config`` is
        the resolved configuration (shown by W&B), ``config_hash`` its identity, written with every record; ``warn``
        takes one-line warnings, standard error by default. Raises
        `CapabilityError` where a sink is switched on and its library is not installed, `OutputError` where ``run_dir``
        cannot be written.
        """
        _require("tensorboard", tensorboard)
        _require("wandb", wandb)
        self._config_hash = config_hash
        self._warn: Warn = warn or (lambda text: print(text, file=sys.stderr, flush=True))
        self._logs = {name: _Log(run_dir / name, resume_step, self._warn) for name in (METRICS_FILE, EVAL_FILE)}
        sinks: list[Sink] = list(extra_sinks)
        if tensorboard:
            sinks.append(TensorBoardSink(run_dir / "tensorboard", resume_step))
        if wandb:
            sinks.append(WandbSink(run_dir, config, resume_step))
        self._workers = [SinkWorker(sink, QUEUE_RECORDS, self._warn) for sink in sinks]

    def log(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Log the training metrics of ``step`` (names and kinds of `registry.STEP_METRICS`, else an assertion)."""
        STEP_METRICS.check(metrics)
        now = time.time()
        self._logs[METRICS_FILE].write({"step": step, "time": now, "config": self._config_hash, **metrics})
        self._spread((step, now, "train", dict(metrics)))

    def log_eval(self, step: int, weights: str, metrics: Mapping[str, MetricValue]) -> None:
        """Log an evaluation after ``step`` with the ``raw`` or ``ema`` weights (names of `registry.EVAL_METRICS`)."""
        assert weights in ("raw", "ema"), f"weights must be raw or ema, not {weights!r}"
        EVAL_METRICS.check(metrics)
        now = time.time()
        self._logs[EVAL_FILE].write(
            {"step": step, "weights": weights, "time": now, "config": self._config_hash, **metrics}
        )
        self._spread((step, now, f"eval/{weights}", dict(metrics)))

    @property
    def dropped(self) -> dict[str, int]:
        """Records lost per optional sink: its queue was full or the sink was disabled."""
        return {worker.name: worker.dropped for worker in self._workers}

    def close(self, timeout: float = 15.0) -> None:
        """Write out what is queued and close every sink, in at most ``timeout`` seconds for all of them together."""
        for log in self._logs.values():
            log.close()
        deadline = time.monotonic() + timeout
        for worker in self._workers:
            worker.finish()
        for worker in self._workers:
            worker.join(deadline - time.monotonic())

    def _spread(self, job: _Job) -> None:
        for worker in self._workers:
            worker.put(job)


class SinkWorker:
    """One optional sink behind a bounded queue: `put` never blocks and never raises."""

    def __init__(self, sink: Sink, capacity: int, warn: Warn) -> None:
        self._sink = sink
        self._warn = warn
        self._capacity = capacity
        self._queue: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._finishing = False
        self._failed = False
        self.name = sink.name
        self.dropped = 0
        # A daemon: a sink that hangs for ever must not keep the process from exiting.
        self._thread = threading.Thread(target=self._run, name=f"telemetry-{sink.name}", daemon=True)
        self._thread.start()

    def put(self, job: _Job) -> None:
        """Queue one record; when the queue is full its oldest record is dropped and counted."""
        with self._wake:
            if self._failed:
                self.dropped += 1
                return
            if len(self._queue) >= self._capacity:
                self._queue.popleft()
                self.dropped += 1
            self._queue.append(job)
            self._wake.notify()

    def finish(self) -> None:
        """Ask the thread to write what is queued, close the sink and end."""
        with self._wake:
            self._finishing = True
            self._wake.notify()

    def join(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds for the end; say so if records were lost or the sink still hangs."""
        self._thread.join(max(0.0, timeout))
        if self._thread.is_alive():
            self._warn(f"warning: telemetry sink {self.name} did not close in time; {len(self._queue)} records lost")
        elif self.dropped and not self._failed:
            self._warn(f"warning: telemetry sink {self.name} fell behind and lost {self.dropped} records")

    def _run(self) -> None:
        try:
            self._sink.open()
            while (job := self._next()) is not None:
                self._sink.write(*job)
            self._sink.close()
        except Exception as error:  # a sink's library may raise anything, and none of it may stop training
            with self._wake:
                self._failed = True
                self.dropped += len(self._queue)
                self._queue.clear()
            self._warn(f"warning: telemetry sink {self.name} is disabled: {_one_line(error)}")

    def _next(self) -> _Job | None:
        with self._wake:
            self._wake.wait_for(lambda: self._queue or self._finishing)
            return self._queue.popleft() if self._queue else None


class _Log:
    """A JSON-lines file that is switched off, with one warning, by the first write that fails."""

    def __init__(self, path: Path, resume_step: int, warn: Warn) -> None:
        self._path = path
        self._warn = warn
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            rewind_jsonl(path, resume_step)
            self._writer: JsonlWriter | None = JsonlWriter(path)
        except OSError as error:
            message = f"cannot write {path} ({error.strerror}): free space or choose another run folder"
            raise OutputError(message) from error

    def write(self, record: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write(record)
        except OSError as error:
            self._disable(error)

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
            self._writer = None
        except OSError as error:
            self._disable(error)

    def _disable(self, error: OSError) -> None:
        self._writer = None
        self._warn(f"warning: {self._path} is no longer written, training goes on: {_one_line(error)}")


def _require(library: str, wanted: bool) -> None:
    # A folder named like the library on the search path gives a spec without an origin: not installed either.
    spec = importlib.util.find_spec(library) if wanted else None
    if wanted and (spec is None or spec.origin is None):
        raise CapabilityError(
            f"telemetry.{library}=true needs the package {library}: "
            f"pip install {library}, or set telemetry.{library}=false"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
