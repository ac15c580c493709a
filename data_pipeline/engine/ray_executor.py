"""Tasks on Ray: worth its start (seconds) only across hosts. They meet in the work folder, which all must share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipeline.engine.failures import died, failure
from data_pipeline.engine.local import ONE_THREAD, in_order, progress_of, weight
from data_pipeline.engine.tasks import Stage, pending
from data_pipeline.engine.worker import outcome
from data_pipeline.progress import Log, Progress
from refractor_megatron.errors import CapabilityError, DataError

#: Tasks pass numbers and paths, never text: the smallest store that Ray accepts, in bytes.
_STORE_BYTES = 80 << 20
_TICK = 1.0


class RayExecutor:
    """Runs stages as Ray tasks of one CPU, ``workers`` at a time (0: as many as Ray has CPUs).

    Joins the Ray that this process has initialised or that ``RAY_ADDRESS`` names, and leaves it running; else starts
    one on this host with ``workers`` CPUs and ends it on exit.
    """

    def __init__(self, workers: int, store_bytes: int = _STORE_BYTES) -> None:
        """Raises ``CapabilityError`` without Ray."""
        try:
            import ray
        except ImportError as error:
            raise CapabilityError(
                "data.engine.kind=ray needs Ray; install it with pip install 'refractor-megatron[ray]'."
            ) from error
        self._ray: Any = ray
        self._workers, self._store_bytes, self._started = workers, store_bytes, False
        self._scratch: str | None = None

    def __enter__(self) -> RayExecutor:
        if self._ray.is_initialized():
            return self
        quiet = {"logging_level": "warning", "log_to_driver": False}
        try:
            if os.environ.get("RAY_ADDRESS"):
                self._ray.init(**quiet)
            else:
                cores = self._workers or len(os.sched_getaffinity(0))
                self._scratch = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # its sockets need a short path
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unless asked for
                self._ray.init(
                    address="local",
                    num_cpus=cores,
                    num_gpus=0,
                    include_dashboard=False,
                    object_store_memory=self._store_bytes,
                    _temp_dir=self._scratch,
                    **quiet,
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            self._drop_scratch()
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"Ray does not start ({reason}); mend RAY_ADDRESS or set data.engine.kind=local."
            ) from error
        self._started = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._started:
            self._ray.shutdown()
            self._started = False
            self._drop_scratch()

    def _drop_scratch(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def run(self, stage: Stage, work: Path, log: Log) -> Path:
        """Does every task of ``stage`` that is not done; returns its folder.

        Raises a failed task's ``RefractorError`` as such, ``DataError`` for a worker that died, ``TaskFailed`` for
        anything else. Tasks under way are then cancelled; what is done stays.
        """
        assert self._ray.is_initialized()
        folder = stage.prepare(work).resolve()
        tasks = in_order(stage, pending(folder, stage.count))
        with progress_of(stage, tasks, log) as progress:
            self._run_tasks(stage, folder, tasks, progress)
        return folder

    def _run_tasks(self, stage: Stage, folder: Path, tasks: list[int], progress: Progress) -> None:
        # no second try: a task that kills its worker would kill the next one too
        remote = self._ray.remote(num_cpus=1, max_retries=0, runtime_env={"env_vars": ONE_THREAD})(_outcome)
        most = self._workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        left, busy = deque(tasks), dict[Any, int]()
        try:
            while left or busy:
                while left and len(busy) < most:
                    index = left.popleft()
                    busy[remote.remote(str(folder), index)] = index
                for reference in self._ray.wait(list(busy), timeout=_TICK)[0]:
                    index = busy.pop(reference)
                    self._finish(stage, index, reference)
                    progress.advance(weight(stage, index))
                progress.tick()
        except BaseException:
            for reference in busy:
                self._ray.cancel(reference, force=True)
            raise

    def _finish(self, stage: Stage, index: int, reference: Any) -> None:
        """Raises what the task raised, or that its worker died."""
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            raise died(stage, index, f"was lost by Ray ({type(error).__name__})") from error
        error_of_task = failure(stage, index, answer)
        if error_of_task is not None:
            raise error_of_task


def _outcome(folder: str, index: int) -> dict[str, Any]:
    return outcome(Path(folder), index)
