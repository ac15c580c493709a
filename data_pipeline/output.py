"""Writing results so that a crash, a full disk or a second builder never leaves a half-written one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.progress import Log
from refractor_megatron.errors import OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_DRAFT = ".building-"


@contextlib.contextmanager
def mendable_errors(*folders: Path) -> Iterator[None]:
    """Turns a full or read-only disk, which the user can mend, into ``OutputError``."""
    try:
        yield
    except OSError as error:
        if error.errno is None and "requested and" in str(error):  # how numpy says that the disk is full
            error.errno = errno.ENOSPC
        where = error.filename or " or ".join(map(str, folders))
        if error.errno in _FULL:
            raise OutputError(f"The disk is full while writing {where}; free space there and run again.") from error
        if error.errno in _REFUSED:
            raise OutputError(f"Cannot write {where} ({error.strerror}); choose a folder you may write to.") from error
        raise


@contextlib.contextmanager
def exclusive(folder: Path, log: Log) -> Iterator[None]:
    """Holds ``<folder>/.lock``; waits, and says so, while another process holds it. The kernel frees it on death."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"data: waiting for another build in {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target`` that becomes ``target`` on success and vanishes on failure.

    Call under ``exclusive`` on the parent: every draft found there is then the leftover of a killed build.
    """
    for leftover in target.parent.glob(f"{_DRAFT}*"):
        shutil.rmtree(leftover)
    draft = target.parent / f"{_DRAFT}{target.name}"
    draft.mkdir()
    try:
        yield draft
        fsync_tree(draft)
        draft.rename(target)
        _fsync(target.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def fsync_tree(folder: Path) -> None:
    """Waits until every file and folder under ``folder``, and itself, is on disk."""
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` or leaves it as it was, also if the power fails; it is on disk on return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
        _fsync(path.parent)
    finally:
        draft.unlink(missing_ok=True)
