"""Tasks for the executors' tests, and what a stage's folder holds."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from data_pipeline.engine.tasks import Stage
from refractor_megatron.errors import DataError

HERE = "tests.unit.data_pipeline.engine.jobs"
Params = dict[str, Any]


def stage(function: str, count: int, megabytes: tuple[float, ...] = (), **params: Any) -> Stage:
    """A stage of a function of this module."""
    return Stage("sample", f"{HERE}:{function}", count, params, megabytes=megabytes)


def hashes(params: Params, index: int, out: Path) -> None:
    """Two files in a folder, written in several steps, so that a kill has something to cut."""
    (out / "inner").mkdir()
    data = str(params.get("seed", 0)).encode()
    for step in range(5):
        data = hashlib.sha256(data + bytes([step, index % 256])).digest()
        with (out / "inner" / "first.bin").open("ab") as file:
            file.write(data)
        time.sleep(params.get("pause", 0.0) / 5)
    (out / "second.txt").write_text(data.hex())


def environment(params: Params, index: int, out: Path) -> None:
    """The process and its thread counts; lasts long enough that every worker gets a task."""
    names = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    (out / "said.txt").write_text(" ".join([str(os.getpid()), *(os.environ.get(name, "unset") for name in names)]))
    print("a task may print")
    time.sleep(params.get("pause", 0.0))


def start_times(params: Params, index: int, out: Path) -> None:
    (out / "started.txt").write_text(str(time.monotonic_ns()))


def fails(params: Params, index: int, out: Path) -> None:
    """Task ``bad`` fails as ``how`` says; the others last until they are stopped."""
    (out / "half.txt").write_text("half")
    if index == params["bad"]:
        if how := params.get("sentence"):
            raise DataError(how)
        if params.get("signal"):
            os.kill(os.getpid(), params["signal"])
        if params.get("memory"):
            raise MemoryError
        raise ZeroDivisionError("ours")
    time.sleep(params.get("pause", 60.0))


def waits(params: Params, index: int, out: Path) -> None:
    """Says who it is, starts a program and waits for it, far longer than any test."""
    child = subprocess.Popen(["sleep", "600"])
    signs = Path(params["signs"])
    (signs / f"draft-{index}").write_text(f"{os.getpid()} {child.pid}")
    (signs / f"draft-{index}").rename(signs / f"{index}")
    if params.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child.wait()


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file of a stage's folder, by path; logs and job lists of a batch system left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "slurm" not in path.relative_to(folder).parts
    }


def drafts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    """Waits until ``condition()``; fails if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
