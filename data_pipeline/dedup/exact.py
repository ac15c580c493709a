"""Documents of equal content, across sources: all but the first by rank go."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RULE = "content-key/1"


def exact_survivors(
    keys: npt.NDArray[np.uint8], ranks: npt.NDArray[np.int64], keep: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Of each document [n] that goes, the one of equal key that stays; -1 of all others.

    ``keys`` uint8 [n, 16]: content hashes; ``ranks`` [n]: the lowest stays; documents outside ``keep`` do not count.
    """
    rows = np.flatnonzero(keep)
    halves = np.ascontiguousarray(keys[rows]).view(">u8")
    order = np.lexsort((ranks[rows], halves[:, 1], halves[:, 0]))
    sorted_halves = halves[order]
    fresh = np.ones(len(order), dtype=np.bool_)
    fresh[1:] = (sorted_halves[1:] != sorted_halves[:-1]).any(axis=1)
    first = order[np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))] if len(order) else order
    survivor = np.full(len(keys), -1, dtype=np.int64)
    survivor[rows[order[~fresh]]] = rows[first[~fresh]]
    return survivor
