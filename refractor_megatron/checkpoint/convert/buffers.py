"""Memory for tensors, used again. The first touch of fresh memory costs more than reading a file into old memory."""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

#: Gives a contiguous tensor of this shape and type with any content.
New = Callable[[Sequence[int], torch.dtype], Tensor]
#: Tensors below this come from torch: what they cost is not worth a look at the list.
_SMALL = 1 << 20
#: A block serves tensors down to this part of its size, or the pool would be one of mostly unused bytes.
_FIT = 2


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A ``New`` without a pool."""
    return torch.empty(tuple(shape), dtype=dtype)


class Buffers:
    """A pool. A block comes back by itself once the last tensor that looks into it is gone; any thread may ask.

    Args:
        limit: bytes that the pool may hold, blocks in use included. What is in use may exceed it, and then nothing is
            kept for later, so the pool never holds more than ``max(limit, bytes in use)``.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._held = 0
        self._free: list[mmap.mmap] = []
        self._back: deque[mmap.mmap] = deque()  # filled by finalizers, which may run anywhere and so take no lock

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor with any content."""
        size = math.prod(shape) * dtype.itemsize
        if not self.limit or size < _SMALL:
            return fresh(shape, dtype)
        block = self._take(size)
        array = np.frombuffer(block, dtype=np.uint8, count=size)
        weakref.finalize(array, self._back.append, block).atexit = False
        return torch.from_numpy(array).view(dtype).view(tuple(shape))

    @property
    def held(self) -> int:
        """Bytes of all blocks, in use or not."""
        return self._held

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            while self._back:
                self._free.append(self._back.popleft())
            fitting = [block for block in self._free if size <= len(block) <= _FIT * size]
            if fitting:
                block = min(fitting, key=len)
                self._free.remove(block)
            else:
                block = self._make(size)
            return block

    def _make(self, size: int) -> mmap.mmap:
        self._free.sort(key=len)
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        while self._free and self._held + size > self.limit:
            self._held -= len(self._free.pop())  # unmapped with its last reference
        self._held += size
        block = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        return block
