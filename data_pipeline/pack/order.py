"""Orders by keyed hash, for whole arrays."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from data_pipeline.hashing import mix


def hashed(values: npt.NDArray[np.int64], key: str) -> npt.NDArray[np.uint64]:
    """A keyed 64-bit hash of each value, one to one: ``mix`` twice, of the value and a key of its own
    each time."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    x = values.astype(np.uint64)
    for half in np.frombuffer(digest, dtype="<u8"):
        x = mix(x ^ half)
    return x
