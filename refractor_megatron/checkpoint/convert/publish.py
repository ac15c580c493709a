"""A folder that appears whole or not at all: written hidden beside its place, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import OutputError
from ...resilience.lock import exclusive
from ..manifest import TEMPORARY, sync_folder


@contextmanager
def staged(target: Path, bytes_needed: int) -> Iterator[Path]:
    """A hidden folder that becomes ``target`` when the block ends well and vanishes when it does not.

    What a killed conversion to the same place left behind is removed first; the lock tells it from one that still runs.

    Raises:
        OutputError: ``target`` is not empty, another conversion writes it, it cannot be written, or the disk is too
            small or becomes full.
    """
    _check_free(target)
    made = _make_parents(target)
    hidden = target.with_name(f".{target.name}{TEMPORARY}")
    try:
        with _output_errors(target):
            hidden.mkdir(exist_ok=True)
            with exclusive(hidden):
                try:
                    _empty(hidden)
                    _check_room(target, bytes_needed)
                    yield hidden
                    _sync_files(hidden)
                    (hidden / ".lock").unlink()
                    os.rename(hidden, target)
                except BaseException:
                    shutil.rmtree(hidden, ignore_errors=True)
                    raise
            sync_folder(target.parent)
    except BaseException:
        for folder in made:
            folder.rmdir()
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is what this error, or one that it came from, is about. Torch wraps it in its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "PytorchStreamWriter failed" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _output_errors(target: Path) -> Iterator[None]:
    """Turn what the file system refuses into one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if is_disk_full(error):
            raise OutputError(
                f"no space left while writing {target}: free space or choose another --out; nothing was published."
            ) from None
        if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
            raise OutputError(f"{target} cannot be written ({error.strerror}): choose another --out.") from None
        raise


def _check_free(target: Path) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise OutputError(f"{target} is not empty: choose another --out, or delete it first.")


def _make_parents(target: Path) -> list[Path]:
    """Create the folders above ``target``; returns those that were made, innermost first."""
    missing = [folder for folder in target.absolute().parents if not folder.exists()]
    with _output_errors(target):
        try:
            for folder in reversed(missing):
                folder.mkdir()
        except NotADirectoryError:
            raise OutputError(f"{target} lies below a file: choose another --out.") from None
    return missing


def _empty(hidden: Path) -> None:
    """Remove everything but the lock."""
    for path in hidden.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _check_room(target: Path, bytes_needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < bytes_needed:
        raise OutputError(
            f"the disk of {target} has {free >> 20} MiB free and the result needs {bytes_needed >> 20} MiB: free space "
            "or choose another --out."
        )


def _sync_files(folder: Path) -> None:
    """Files and folders reach the disk before the rename that publishes them."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_symlink():
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
