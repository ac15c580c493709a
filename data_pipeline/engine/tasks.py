"""A stage of the build: tasks 0..count-1 of one function, each with a folder that appears whole or not at all.

A stage lies in ``<work>/<name>-<digest12>``; the digest covers its function, its parameters and, through them, the
digests of the stages it reads. A change of one threshold so reruns what depends on it and nothing else. ``stage.json``
says what to run, so that any process that sees the folder can do any task; ``00007/`` is there when task 7 is done. A
killed task leaves a draft (``.00007.<host>-<pid>``), which nobody reads and the next run sweeps.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.manifest import canonical
from data_pipeline.output import fsync_tree, mendable_errors, write_atomically
from data_pipeline.progress import Log
from data_pipeline.versions import versions
from refractor_megatron.errors import DataError

#: What a task is: ``function(params, index, out)`` writes its results into the empty folder ``out``.
Task = Callable[[dict[str, Any], int, Path], None]
_FILE = "stage.json"
_SWEPT = ".swept"
#: Age at which the draft of a process on another host, which cannot be asked, counts as abandoned.
_FORGOTTEN_SECONDS = 7 * 86400.0


@dataclass(frozen=True)
class Stage:
    """``function``: "module:name" of a ``Task``; ``params``: JSON values, paths as strings; ``version``: raised when
    the same parameters would give other bytes; ``megabytes``: size of each task's input, for the progress line.

    The versions of this code and of its libraries are part of the digest; a host that has others refuses the task.
    ``volatile`` parameters (paths of folders whose content another parameter's digest already states, thread counts)
    reach the task but not the digest.
    """

    name: str
    function: str
    count: int
    params: dict[str, Any]
    version: int = 1
    volatile: dict[str, Any] = field(default_factory=dict)
    megabytes: tuple[float, ...] = ()

    @property
    def digest(self) -> str:
        """sha256 of what determines the results."""
        body = [self.name, self.function, self.version, self.count, self.params, versions()]
        return hashlib.sha256(canonical(body)).hexdigest()

    def folder(self, work: Path) -> Path:
        """Where the stage lies under ``work``."""
        return work / f"{self.name}-{self.digest[:12]}"

    def prepare(self, work: Path) -> Path:
        """Makes the folder with ``stage.json`` and sweeps drafts of killed tasks; returns it."""
        folder = self.folder(work)
        with mendable_errors(work):
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            params = {**self.params, **self.volatile}
            body = {"function": self.function, "count": self.count, "params": params, "versions": versions()}
            write_atomically(folder / _FILE, json.dumps(body, indent=1, sort_keys=True) + "\n")
        return folder


def _sweep(folder: Path) -> None:
    """Takes away the drafts of tasks that no longer run."""
    for draft in folder.glob(".[0-9]*"):
        if _abandoned(draft):
            # at once: whoever does still write there then fails, and cannot publish what deleting has left of it
            with contextlib.suppress(OSError):
                draft.rename(draft.with_name(f"{_SWEPT}{draft.name}"))
    for swept in folder.glob(f"{_SWEPT}*"):
        shutil.rmtree(swept, ignore_errors=True)


def _abandoned(draft: Path) -> bool:
    """Whether the process that a draft is named after is dead; on another host, whether it is old enough to be."""
    host, _, pid = draft.name.split(".", 2)[2].rpartition("-")
    try:
        if host != socket.gethostname():
            return time.time() - draft.stat().st_mtime > _FORGOTTEN_SECONDS
        os.kill(int(pid), 0)
    except PermissionError:
        return False  # another user's, and alive
    except OSError:
        return True
    return False


def pending(folder: Path, count: int) -> list[int]:
    """Tasks of a stage folder that have not been done."""
    return [index for index in range(count) if not task_folder(folder, index).is_dir()]


def task_folder(folder: Path, index: int) -> Path:
    """Results of one task."""
    return folder / f"{index:05d}"


def run_task(folder: Path, index: int) -> None:
    """Does task ``index`` of the stage in ``folder`` unless it is done. Raises what the task raises."""
    target = task_folder(folder, index)
    if target.is_dir():
        return
    stage = json.loads((folder / _FILE).read_bytes())
    other = [name for name, version in versions().items() if stage["versions"].get(name) != version]
    if other:
        raise DataError(
            f"This host has {other[0]} {versions()[other[0]]}, the build {stage['versions'].get(other[0])}: install "
            "the same versions everywhere, or the dataset would depend on who made it."
        )
    module, _, name = stage["function"].partition(":")
    function: Task = getattr(importlib.import_module(module), name)
    draft = folder / f".{index:05d}.{socket.gethostname()}-{os.getpid()}"
    with mendable_errors(folder):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            function(stage["params"], index, draft)
            fsync_tree(draft)
            try:
                draft.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was first, with the same bytes
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)


class Executor(Protocol):
    """Runs stages. The results never depend on which executor ran them, nor on how many workers it had."""

    def run(self, stage: Stage, work: Path, log: Log) -> Path:
        """Does every task of ``stage`` that is not done, with progress; returns the stage's folder.

        Raises the first failed task's error (a ``RefractorError`` as such).
        """
