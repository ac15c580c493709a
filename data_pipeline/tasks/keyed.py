"""Choices that are functions of a key: no generator state, so nothing depends on what was drawn before or elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from data_pipeline.hashing import MASK64, STEP, mix, mix_one

T = TypeVar("T")


def key_of(*parts: int | str) -> int:
    """64 bits that stand for ``parts``."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def hashes(key: int, numbers: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint64]:
    """A hash of each number under ``key``, uint64."""
    return mix(numbers.astype(np.uint64) * np.uint64(STEP) + np.uint64(key))


class Draws:
    """A sequence of draws under one key, such as (seed, stage, number of the task)."""

    def __init__(self, *parts: int | str) -> None:
        self._state = key_of(*parts)

    def below(self, n: int) -> int:
        """A number in 0..n-1, n >= 1; uneven by at most n / 2**64."""
        assert n >= 1
        self._state = (self._state + STEP) & MASK64
        return mix_one(self._state) * n >> 64

    def between(self, low: int, high: int) -> int:
        """A number in low..high, both included."""
        return low + self.below(high - low + 1)

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """``items`` in a drawn order (Fisher and Yates)."""
        out = list(items)
        for last in range(len(out) - 1, 0, -1):
            other = self.below(last + 1)
            out[last], out[other] = out[other], out[last]
        return out
