"""Places of many keys in a large array, by a hash table: two waits for memory, where a binary search has many."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # Knuth's multiplicative hashing, for 64 bits


@njit(cache=True, nogil=True)
def _fill(keys, slots, shift):  # type: ignore[no-untyped-def]  # pragma: no cover (compiled)
    mask = np.uint64(len(slots) - 1)
    for place in range(len(keys)):
        at = keys[place] * _FACTOR >> shift
        while slots[at]:
            at = (at + np.uint64(1)) & mask
        slots[at] = place + 1


@njit(cache=True, nogil=True)
def place_of(table, key):  # type: ignore[no-untyped-def]  # pragma: no cover (compiled)
    """Place of the uint64 ``key`` among those of a ``KeyTable.table``, -1 if it is not there."""
    keys, slots, shift = table
    mask = np.uint64(len(slots) - 1)
    at = key * _FACTOR >> shift
    while slots[at]:
        place = np.int64(slots[at]) - 1
        if keys[place] == key:
            return place
        at = (at + np.uint64(1)) & mask
    return -1


@njit(cache=True, nogil=True)
def _find(table, wanted, out):  # type: ignore[no-untyped-def]  # pragma: no cover (compiled)
    for i in range(len(wanted)):
        out[i] = place_of(table, wanted[i])


class KeyTable:
    """Finds 64-bit ``keys``, distinct [n], n < 2^32. Takes 8 to 16 bytes for each beside them.

    ``table``, for kernels: (keys uint64 [n], slots uint32 [power of two]: place + 1 or 0, bits to shift a hash by).
    """

    def __init__(self, keys: npt.NDArray[Any]) -> None:
        unsigned = np.ascontiguousarray(keys).view(np.uint64)
        bits = len(keys).bit_length() + 1
        self.table = unsigned, np.zeros(1 << bits, np.uint32), np.uint64(64 - bits)
        _fill(*self.table)

    def find(self, wanted: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Place of each of ``wanted`` [m]; -1 for a key that is not there."""
        out = np.empty(len(wanted), np.int64)
        _find(self.table, np.ascontiguousarray(wanted).view(np.uint64), out)
        return out
