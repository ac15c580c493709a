"""Tasks as SLURM job arrays: array task i runs ``refractor data task FOLDER i``, and the folder says what is done.

The submitting process only waits. If it is killed the array goes on; the next run finds it by its name, which is noted
before it is submitted, and waits for it again.
The work folder must be one that the nodes share.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from data_pipeline.engine.local import in_order, progress_of, weight
from data_pipeline.engine.tasks import Stage, pending, task_folder
from data_pipeline.output import mendable_errors, write_atomically
from data_pipeline.progress import Log, Progress
from refractor_megatron.errors import CapabilityError, DataError

#: What our own options of sbatch would contradict.
_OURS = re.compile(r"(-a|-o|-e|-J|-W|--array|--output|--error|--job-name|--parsable|--wait|--wrap)(=|$)|-[aoeJ].")
#: Length of an array where the cluster does not state one; SLURM's own default, and a bound on the command line.
_ARRAY, _LONGEST_ARRAY = 1001, 10_000
#: Polls in a row that squeue may fail to answer, as it does while its controller restarts.
_PATIENCE = 30

_SCRIPT = """#!/bin/bash
# Runs one task of {name}; $1 is the number of array task 0.
threads="${{SLURM_CPUS_PER_TASK:-1}}"
export OMP_NUM_THREADS="$threads" OPENBLAS_NUM_THREADS="$threads" MKL_NUM_THREADS="$threads"
export NUMBA_NUM_THREADS="$threads" RAYON_NUM_THREADS="$threads"
exec {python} -m refractor_megatron.cli data task {folder} "$(($1 + SLURM_ARRAY_TASK_ID))"
"""


def compressed(indexes: Iterable[int]) -> str:
    """Rising numbers as sbatch writes them: 0-3,7,9-10."""
    runs: list[list[int]] = []
    for index in indexes:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


class SlurmExecutor:
    """Runs stages as job arrays of at most ``limit`` tasks at once (0: as many as the cluster lets run).

    ``arguments`` go to sbatch: partition, account, time, memory. ``poll_s``: how often the queue is looked at;
    ``lag_s``: how long a file written on a node may take to be seen here.
    """

    def __init__(self, arguments: tuple[str, ...], limit: int, poll_s: float = 5.0, lag_s: float = 60.0) -> None:
        """Raises ``CapabilityError`` without SLURM's commands, ``DataError`` for an argument that is ours to give."""
        for program in ("sbatch", "squeue", "scancel"):
            if shutil.which(program) is None:
                raise CapabilityError(
                    f"data.engine.kind=slurm needs {program} on the PATH; run it on a login node or set it to local."
                )
        for argument in arguments:
            if _OURS.match(argument):
                raise DataError(f"data.engine.arguments: {argument} is set by the build itself; remove it.")
        self._arguments, self._limit, self._poll_s, self._lag_s = arguments, limit, poll_s, lag_s

    def __enter__(self) -> SlurmExecutor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Nothing to end: an array is over, or cancelled, when ``run`` returns."""

    def run(self, stage: Stage, work: Path, log: Log) -> Path:
        """Does every task of ``stage`` that is not done; returns its folder.

        A task that ends without its result is a ``DataError`` with the last line of its log; the rest of its array is
        cancelled. Nothing is submitted a second time within a run.
        """
        folder = stage.prepare(work).resolve()
        tasks = pending(folder, stage.count)
        if not tasks:
            return folder
        with mendable_errors(folder), progress_of(stage, in_order(stage, tasks), log) as progress:
            (folder / "slurm").mkdir(exist_ok=True)
            write_atomically(folder / "slurm" / "task.sh", self._script(stage, folder))
            for array in self._arrays(stage, folder, log):
                with array.cancelled_on_error():
                    self._wait(array, progress)
        return folder

    def _script(self, stage: Stage, folder: Path) -> str:
        return _SCRIPT.format(
            name=f"stage {stage.name}", python=shlex.quote(sys.executable), folder=shlex.quote(str(folder))
        )

    def _arrays(self, stage: Stage, folder: Path, log: Log) -> Iterator[_Array]:
        """One array after the other, so that ``limit`` bounds them all: an earlier run's, then what is left."""
        earlier = self._earlier(stage, folder, log)
        if earlier is not None:
            log(f"{stage.name}: waiting for SLURM job {earlier.job} of an earlier run")
            yield earlier
        size = min(_longest_array(), _LONGEST_ARRAY)
        tasks = pending(folder, stage.count)
        for first in sorted({index // size * size for index in tasks}):
            chunk = [index for index in tasks if first <= index < first + size]
            job = self._submit(stage, folder, first, chunk)
            log(f"{stage.name}: SLURM job {job}, {len(chunk)} tasks")
            yield _Array(stage, folder, job, first, chunk)

    def _earlier(self, stage: Stage, folder: Path, log: Log) -> _Array | None:
        """What is queued of the array that an earlier run has noted. One that was killed while sbatch ran may have left
        an sbatch that submits yet: it has ``lag_s`` to do so.
        """
        note = _Note.read(folder)
        if note is None:
            return None
        since, said = time.monotonic(), False
        while True:
            job, numbers = self._look_up(note.name)
            if numbers:
                return _Array(stage, folder, job, note.first, [note.first + number for number in sorted(numbers)])
            if note.answered or time.monotonic() - since >= self._lag_s:
                return None
            if not said:
                log(f"{stage.name}: an earlier run ended while it submitted; looking for its job for {self._lag_s:g} s")
                said = True
            time.sleep(self._poll_s)

    def _look_up(self, name: str) -> tuple[str, set[int]]:
        """``(job, numbers of its tasks that wait or run)`` of an array. Raises ``DataError`` if squeue does not answer,
        for then nothing may be submitted: the array might be there.
        """
        for silent in range(_PATIENCE + 1):
            if silent:
                time.sleep(self._poll_s)
            found = _named(name)
            if found is not None:
                return found
        raise DataError(f"squeue does not answer for SLURM job {name}; run again when it does.")

    def _submit(self, stage: Stage, folder: Path, first: int, chunk: list[int]) -> str:
        """Submits an array and returns its job number. Its name is noted first, and is that of no other array."""
        note = _Note(f"refractor-{folder.name}-{uuid.uuid4().hex[:12]}", first, answered=False)
        limit = f"%{self._limit}" if self._limit else ""
        command = ["sbatch", *self._arguments, "--parsable", f"--job-name={note.name}"]
        command += [f"--array={compressed(index - first for index in chunk)}{limit}"]
        command += [f"--output={folder}/slurm/%A_%a.log", str(folder / "slurm" / "task.sh"), str(first)]
        note.write(folder)
        try:
            answer = _ask(command)
        except BaseException:
            _ask(["scancel", f"--name={note.name}"])  # interrupted: it may have been submitted
            raise
        replace(note, answered=True).write(folder)
        if answer.returncode:
            raise DataError(
                f"sbatch refused stage {stage.name} ({_last_line(answer.stderr)}); correct data.engine.arguments."
            )
        return answer.stdout.strip().partition(";")[0]

    def _wait(self, array: _Array, progress: Progress) -> None:
        """Until every task is done. Raises ``DataError`` once tasks have left the queue without a result."""
        left, gone, silent = set(array.tasks), dict[int, float](), 0  # gone: since when
        while True:
            # the queue first: what leaves it in between has its result by then
            queued = _queued(array.job)
            for index in sorted(left & _done(array.folder)):
                left.discard(index)
                progress.advance(weight(array.stage, index))
            if not left:
                return
            silent = silent + 1 if queued is None else 0
            if silent > _PATIENCE:
                raise DataError(f"squeue does not answer for SLURM job {array.job}; run again when it does.")
            if queued is not None:
                now = time.monotonic()
                gone = {index: gone.get(index, now) for index in left - {array.first + number for number in queued}}
                if lost := sorted(index for index, since in gone.items() if now - since >= self._lag_s):
                    raise array.failure(lost)
            progress.tick()
            time.sleep(self._poll_s)


@dataclass(frozen=True)
class _Note:
    """The last array that was submitted for a stage, or was about to be: ``answered`` says whether sbatch has ended."""

    name: str
    first: int
    answered: bool

    @classmethod
    def read(cls, folder: Path) -> _Note | None:
        """The note in a stage's folder. Raises ``DataError`` if it is damaged."""
        path = folder / "slurm" / "job"
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); cancel what SLURM still runs of this stage, delete it and run again."
            ) from error

    def write(self, folder: Path) -> None:
        """Puts it in place of the one before."""
        write_atomically(folder / "slurm" / "job", json.dumps(asdict(self)) + "\n")


class _Array:
    """A submitted array: its task number n is task ``first + n`` of the stage."""

    def __init__(self, stage: Stage, folder: Path, job: str, first: int, tasks: list[int]) -> None:
        self.stage, self.folder, self.job, self.first, self.tasks = stage, folder, job, first, tasks

    @contextlib.contextmanager
    def cancelled_on_error(self) -> Iterator[None]:
        """Takes what is left out of the queue if the body fails or is interrupted."""
        try:
            yield
        except BaseException:
            _ask(["scancel", self.job])
            raise

    def failure(self, tasks: list[int]) -> DataError:
        """The sentence for tasks that ended without a result."""
        name = f"{self.job}_{tasks[0] - self.first}"
        path = self.folder / "slurm" / f"{name}.log"
        said = _last_line(path.read_text(errors="replace")) if path.is_file() else ""
        state = _state(name)
        others = f" (and {len(tasks) - 1} more)" if len(tasks) > 1 else ""
        reasons = ", ".join(reason for reason in (state, said.removeprefix("error: ").removesuffix(".")) if reason)
        return DataError(
            f"Task {tasks[0]} of stage {self.stage.name}{others} ended without a result in SLURM job {name} "
            f"({reasons or 'it left no log'}); see {path} and run again: what is done is kept."
        )


def _ask(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a SLURM command without the variables of a job that this process may itself be part of, and without the
    user's own of squeue, which may hide jobs.
    """
    hidden = ("SLURM_", "SQUEUE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden) or name == "SLURM_CONF"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=kept, stdin=subprocess.DEVNULL)


def _queued(job: str) -> set[int] | None:
    """Numbers of the array's tasks that wait or run; None if squeue cannot say."""
    answer = _ask(["squeue", "--noheader", "--array", f"--jobs={job}", "--format=%K"])
    if answer.returncode:
        return set() if "Invalid job id" in answer.stderr else None  # SLURM forgets a job minutes after its end
    return {int(word) for word in answer.stdout.split() if word.isdigit()}


def _named(name: str) -> tuple[str, set[int]] | None:
    """``(job, numbers of its tasks that wait or run)`` of the array of this name; None if squeue cannot say."""
    answer = _ask(["squeue", "--noheader", "--all", "--array", f"--name={name}", "--format=%F %K"])
    if answer.returncode:
        return None
    rows = [line.split() for line in answer.stdout.splitlines() if line.strip()]
    assert len({job for job, _ in rows}) <= 1, "no two arrays have one name"
    return (rows[0][0], {int(number) for _, number in rows}) if rows else ("", set())


def _done(folder: Path) -> set[int]:
    """Tasks whose results are there, by one listing: asking for each by name would keep "no" in a network's cache."""
    return {int(entry.name) for entry in os.scandir(folder) if entry.name.isdigit() and entry.is_dir()}


def _state(name: str) -> str:
    """How accounting says a task ended, such as OUT_OF_MEMORY; empty where there is no accounting."""
    if shutil.which("sacct") is None:
        return ""
    answer = _ask(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={name}", "--format=State"])
    return answer.stdout.strip().partition("\n")[0]


def _longest_array() -> int:
    """The cluster's MaxArraySize: array task numbers must stay below it."""
    if shutil.which("scontrol") is None:
        return _ARRAY
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask(["scontrol", "show", "config"]).stdout, re.MULTILINE)
    return int(found[1]) if found and int(found[1]) > 0 else _ARRAY


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


assert task_folder(Path(), 7).name.isdigit()  # what ``_done`` reads
