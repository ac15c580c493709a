"""A folder that appears whole or not at all: written hidden beside its place, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import OutputError
from ...resilience.lock import exclusive
from ..manifest import TEMPORARY, sync_folder


@contextmanager
def staged(target: Path, bytes_needed: int) -> Iterator[Path]:
    """A hidden folder that becomes ``target`` when the block ends well and vanishes when it does not.

    What a killed conversion to the same place left behind is removed first; the lock tells it from one that still runs.

    Raises:
        OutputError: ``target`` is not empty, a link, a mount point or the working folder, another conversion writes it,
            it cannot be written, or the disk is too small or becomes full.
    """
    target = target.absolute()
    if target.name == "..":
        target = target.resolve()
    hidden = target.parent / f".{target.name}{TEMPORARY}"
    _check_free(target, hidden)
    made = _make_parents(target)
    try:
        with _output_errors(target):
            with _refusals(target):
                hidden.mkdir(exist_ok=True)
            with exclusive(hidden):
                try:
                    _empty(hidden)
                    _check_room(target, bytes_needed)
                    yield hidden
                    _sync_files(hidden)
                    (hidden / ".lock").unlink()
                    with _refusals(target):
                        os.rename(hidden, target)
                except BaseException:
                    shutil.rmtree(hidden, ignore_errors=True)
                    raise
            sync_folder(target.parent)
    except BaseException:
        _remove(made)
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


@contextmanager
def _refusals(target: Path) -> Iterator[None]:
    """For single steps on ``target`` itself: whatever the file system says is about ``--out``."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(
                f"{target} is not empty, someone else has written there meanwhile: choose another --out."
            ) from None
        if error.errno == errno.ENOTDIR:
            raise OutputError(f"{target} is a file or lies below one: choose another --out.") from None
        raise OutputError(f"{target} cannot be written ({error.strerror}): choose another --out.") from None


def _check_free(target: Path, hidden: Path) -> None:
    """Everything that would stop the rename in the end, before any work."""
    with _refusals(target):
        if target.is_symlink() or hidden.is_symlink():
            link = target if target.is_symlink() else hidden
            raise OutputError(f"{link} is a link, which a rename would replace: give --out the folder itself.")
        if hidden.exists() and not hidden.is_dir():
            raise OutputError(f"{hidden}, where the result is written first, is a file: delete it.")
        if not target.exists():
            return
        if target.is_file():
            raise OutputError(f"{target} is not empty, it is a file: choose another --out, or delete it first.")
        if not target.is_dir() or any(target.iterdir()):
            raise OutputError(f"{target} is not empty: choose another --out, or delete it first.")
        if target.is_mount():
            raise OutputError(f"{target} is a mount point, which cannot be replaced: give --out a folder within it.")
        if target.samefile(Path.cwd()):
            raise OutputError(f"{target} is the folder that you are in, which is replaced: give --out a folder in it.")


def _make_parents(target: Path) -> list[Path]:
    """Create the folders above ``target``; returns those that were made, innermost first."""
    made: list[Path] = []
    try:
        with _output_errors(target), _refusals(target):
            for folder in reversed([folder for folder in target.parents if not folder.exists()]):
                try:
                    folder.mkdir()
                except FileExistsError:  # by another conversion, just now
                    if not folder.is_dir():
                        raise OutputError(f"{folder} is no folder: choose another --out.") from None
                else:
                    made.insert(0, folder)
    except BaseException:
        _remove(made)
        raise
    return made


def _remove(made: list[Path]) -> None:
    """Remove the folders that were made, as far as nobody else uses them."""
    with suppress(OSError):
        for folder in made:
            folder.rmdir()


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
