"""Mixing of 64-bit integers, for arrays and for single numbers: the finaliser of splitmix64 (Steele, Lea and Flood
2014), one to one, so different numbers stay different."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MASK64 = (1 << 64) - 1
#: Step of splitmix64's counter, the odd number nearest to 2**64 divided by the golden ratio.
STEP = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of each number, uint64 of any shape."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


def mix_one(x: int) -> int:
    """The same of one number in 0..2**64-1."""
    x = (x ^ x >> 30) * _FIRST & MASK64
    x = (x ^ x >> 27) * _SECOND & MASK64
    return x ^ x >> 31
