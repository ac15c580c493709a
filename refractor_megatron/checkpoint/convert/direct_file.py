"""Files written and read past the page cache: its copy costs more than the disk needs for the same bytes.

What is read is what the disk has. A file system that refuses direct access gets ordinary calls; the bytes are the same.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import math
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .buffers import Buffers, fresh

#: Bytes that reach the disk at once, and how many such pieces are on their way.
_STAGE = 4 << 20
_STAGES = 3
#: Offsets and sizes of direct writes are multiples of the disk's blocks, which are no larger.
_BLOCK = 4096
#: Tensors begin at multiples of this in memory, or arithmetic on them would be slow.
_WORD = 8
#: Bytes of a file that are looked up in the page cache.
_PROBES = 8
_DIRECT: int = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """A file that is written once from front to back. Writing and hashing run in threads beside the caller.

    Args:
        digest: compute the sha256 of the file. ``record`` has it, and the size, once the file is closed.

    Errors of the disk surface in a later ``write`` or in ``close``.
    """

    def __init__(self, path: Path, *, digest: bool = False) -> None:
        self._file = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._stages = [memoryview(mmap.mmap(-1, _STAGE)) for _ in range(_STAGES)]
        self._busy: list[list[Future[None]]] = [[] for _ in self._stages]
        self._disk, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._digest = hashlib.sha256() if digest else None
        self._at = 0

    @property
    def record(self) -> dict[str, Any]:
        """Size and sha256, as manifests have them."""
        assert self._digest is not None
        return {"bytes": self._at, "sha256": self._digest.hexdigest()}

    def tell(self) -> int:
        """Bytes written so far."""
        return self._at

    def flush(self) -> None:
        """Nothing: whole stages go to the disk, and ``close`` writes the rest."""

    def write(self, data: Any) -> int:
        """Append a buffer; it may be used again at once."""
        source = memoryview(data)
        if not source.nbytes:
            return 0
        source, done = source.cast("B"), 0
        while done < len(source):
            number, start = divmod(self._at, _STAGE)
            stage = number % _STAGES
            if not start:
                self._wait(stage)
            count = min(_STAGE - start, len(source) - done)
            self._stages[stage][start : start + count] = source[done : done + count]
            done, self._at = done + count, self._at + count
            if start + count == _STAGE:
                self._send(number, _STAGE)
        return done

    def close(self) -> None:
        """Write the rest; everything is on the disk afterwards."""
        try:
            number, rest = divmod(self._at, _STAGE)
            if rest:
                whole = _whole(rest)
                self._stages[number % _STAGES][rest:whole] = bytes(whole - rest)
                self._send(number, rest)
            for stage in range(_STAGES):
                self._wait(stage)
            os.ftruncate(self._file, self._at)
            os.fsync(self._file)
        finally:
            self.abort()

    def abort(self) -> None:
        """Close the file as it is."""
        self._disk.shutdown()
        self._hasher.shutdown()
        os.close(self._file)

    def _wait(self, stage: int) -> None:
        for future in self._busy[stage]:
            future.result()
        self._busy[stage] = []

    def _send(self, number: int, size: int) -> None:
        stage = self._stages[number % _STAGES]
        busy = self._busy[number % _STAGES]
        busy.append(self._disk.submit(_put, self._file, stage[: _whole(size)], number * _STAGE))
        if self._digest is not None:
            busy.append(self._hasher.submit(self._digest.update, stage[:size]))


def read_tensor(path: Path, start: int, shape: Sequence[int], dtype: torch.dtype, buffers: Buffers) -> Tensor:
    """A tensor whose bytes begin at ``start``, in memory of ``buffers``. Raises ``EOFError`` where the file ends early.

    A file that the page cache holds comes from there, any other straight from the disk. That gives whole blocks, so the
    memory begins and ends with what lies beside the tensor.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return fresh(shape, dtype)
    before = start % _BLOCK
    memory = buffers.empty((_whole(before + size),), torch.uint8).numpy()
    # memory of torch lies anywhere, that of a pool begins a page
    direct = memory.ctypes.data % _BLOCK == 0 and not _is_cached(path, os.stat(path).st_ino)
    before = before if direct else 0
    view = memory.data
    file = _open(path, os.O_RDONLY, direct=direct)
    try:
        done = 0
        while done < before + size:
            count = _retried(file, partial(os.preadv, file, [view[done:]], start - before + done))
            if not count:
                raise EOFError("it ends within the numbers")
            done += count
    finally:
        os.close(file)
    if before % _WORD:
        ctypes.memmove(memory.ctypes.data, memory.ctypes.data + before, size)
        before = 0
    # cut by numpy: the tensor's storage is then the tensor, which is what torch.save would write
    return torch.from_numpy(memory[before : before + size]).view(dtype).view(tuple(shape))


@lru_cache(maxsize=1024)
def _is_cached(path: Path, inode: int) -> bool:
    """Whether the page cache has a file, judged by some of its bytes. Decided once: to ask brings pages in."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        places = [size * (2 * n + 1) // (2 * _PROBES) for n in range(_PROBES)]
        try:
            return all(os.preadv(file.fileno(), [bytearray(1)], at, os.RWF_NOWAIT) for at in places)
        except OSError:  # it would have to wait for the disk, or cannot tell
            return False


def _whole(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _open(path: Path, flags: int, *, direct: bool = True) -> int:
    try:
        return os.open(path, flags | (_DIRECT if direct else 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _put(file: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += _retried(file, partial(os.pwrite, file, data[done:], at + done))


def _retried(file: int, access: Callable[[], int]) -> int:
    """``access``, once more in the ordinary way where a file system takes the flag and then refuses its use."""
    try:
        return access()
    except OSError as error:
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & _DIRECT:
            raise
        fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)
        return access()
