"""Tasks on this host: in this process, or on a pool of worker processes that lives as long as the build.

Workers are started as fresh interpreters rather than by ``multiprocessing``: a fork would copy a process that may hold
torch and its threads, and ``spawn`` and ``forkserver`` would import the caller's ``__main__`` once more, which runs a
script without a guard again. Fresh interpreters also see the thread counts before any library reads them. Each pays its
imports (about a second with numba) once in a build.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipeline.engine.failures import died, failure
from data_pipeline.engine.tasks import Stage, pending, run_task
from data_pipeline.engine.worker import GRACE_SECONDS
from data_pipeline.progress import Log, Progress

#: A pool has one process per core: libraries must not start threads of their own in each.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",  # also Arrow's pool
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_START = (
    "import sys; sys.path[:] = sys.argv[2:]; from data_pipeline.engine.worker import serve; serve(int(sys.argv[1]))"
)
#: Less input than this is done in this process sooner than a pool starts (10^6 bytes).
_SMALL = 4.0
#: How often progress is shown while nothing ends (seconds).
_TICK = 1.0


def in_order(stage: Stage, tasks: list[int]) -> list[int]:
    """Largest first, so that no long task is left over at the end; by number where sizes are not known or equal."""
    sizes = stage.megabytes
    return sorted(tasks, key=lambda index: (-sizes[index], index)) if sizes else sorted(tasks)


def progress_of(stage: Stage, tasks: list[int], log: Log) -> Progress:
    """Progress over ``tasks``: in megabytes where the stage states them."""
    if stage.megabytes:
        return Progress(stage.name, sum(stage.megabytes[index] for index in tasks), log)
    return Progress(stage.name, len(tasks), log, unit="tasks")


def weight(stage: Stage, index: int) -> float:
    """What a done task adds to the progress."""
    return stage.megabytes[index] if stage.megabytes else 1.0


class LocalExecutor:
    """Runs stages on ``workers`` processes; use as a context manager, which ends them.

    One worker, a single task left to do, or little input before there is a pool, means this very process. The first
    stage that needs the pool starts it.
    """

    def __init__(self, workers: int) -> None:
        assert workers >= 1
        self._workers = workers
        self._pool: list[_Worker] = []

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop()

    def run(self, stage: Stage, work: Path, log: Log) -> Path:
        """Does every task of ``stage`` that is not done; returns its folder.

        Raises a failed task's ``RefractorError`` as such, ``DataError`` for a worker that died, ``TaskFailed`` for
        anything else a worker raised. Tasks under way are then stopped; what is done stays.
        """
        assert not stage.megabytes or len(stage.megabytes) == stage.count
        folder = stage.prepare(work)
        tasks = in_order(stage, pending(folder, stage.count))
        with progress_of(stage, tasks, log) as progress:
            if self._workers == 1 or len(tasks) == 1 or self._small(stage, tasks):
                for index in tasks:
                    run_task(folder, index)
                    progress.advance(weight(stage, index))
            elif tasks:
                self._run_on_pool(stage, folder, tasks, progress)
        return folder

    def _small(self, stage: Stage, tasks: list[int]) -> bool:
        return not self._pool and bool(stage.megabytes) and sum(stage.megabytes[index] for index in tasks) < _SMALL

    def _run_on_pool(self, stage: Stage, folder: Path, tasks: list[int], progress: Progress) -> None:
        left = deque(tasks)
        busy: dict[Connection, _Worker] = {}
        try:
            self._grow(min(self._workers, len(tasks)))
            for worker in self._pool[: len(tasks)]:
                worker.start(stage, folder, left.popleft())
                busy[worker.channel] = worker
            while busy:
                for channel in wait(list(busy), timeout=_TICK):
                    assert isinstance(channel, Connection)
                    worker = busy.pop(channel)
                    progress.advance(weight(stage, worker.finish(stage)))
                    if left:
                        worker.start(stage, folder, left.popleft())
                        busy[channel] = worker
                progress.tick()
        except BaseException:  # KeyboardInterrupt too: no worker may go on without us
            self._stop()
            raise

    def _grow(self, size: int) -> None:
        while len(self._pool) < size:
            self._pool.append(_Worker())

    def _stop(self) -> None:
        """Ends all workers: they get a moment to take their drafts away."""
        pool, self._pool = self._pool, []
        for worker in pool:
            worker.channel.close()
        deadline = time.monotonic() + 2 * GRACE_SECONDS
        for worker in pool:
            worker.end(deadline)


class _Worker:
    """A worker process and the task it has."""

    def __init__(self) -> None:
        self.channel, theirs = Pipe()
        self.index = -1
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ONE_THREAD},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C on a terminal is ours to handle
            )
        finally:
            theirs.close()

    def start(self, stage: Stage, folder: Path, index: int) -> None:
        """Hands over a task. Raises ``DataError`` if the worker has died since its last one."""
        self.index = index
        try:
            self.channel.send_bytes(json.dumps([str(folder), index]).encode())
        except OSError as error:
            raise died(stage, index, self._how()) from error

    def finish(self, stage: Stage) -> int:
        """Takes the answer and returns the task's number. Raises what the task raised."""
        try:
            answer: dict[str, Any] = json.loads(self.channel.recv_bytes())
        except (EOFError, OSError) as error:
            raise died(stage, self.index, self._how()) from error
        error_of_task = failure(stage, self.index, answer)
        if error_of_task is not None:
            raise error_of_task
        return self.index

    def _how(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_SECONDS)
        code = self.process.returncode
        if code is not None and code < 0:
            often = "; often for lack of memory" if -code == signal.SIGKILL else ""
            return f"lost its worker process to signal {-code} ({signal.strsignal(-code)}{often})"
        return f"lost its worker process, which ended with status {code}"

    def end(self, deadline: float) -> None:
        """Waits until ``deadline`` for the process, then kills it with all that it has started."""
        try:
            self.process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
