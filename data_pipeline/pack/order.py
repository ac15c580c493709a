"""Orders by keyed hash, for whole arrays."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def hashed(values: npt.NDArray[np.int64], key: str) -> npt.NDArray[np.uint64]:
    """A keyed 64-bit hash of each value, one to one: the finaliser of splitmix64 (Steele, Lea and Flood 2014), twice,
    on the value and a key of its own each time."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    x = values.astype(np.uint64)
    for half in np.frombuffer(digest, dtype="<u8"):
        x = x ^ half
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        x = x ^ x >> np.uint64(31)
    return x
