"""Exact Jaccard indices of candidate pairs, on sets of 64-bit shingle hashes made for the candidates alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from data_pipeline.dedup.shingles import shingle

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]


@njit(cache=True, nogil=True)
def _squeeze(hashes, starts, out_starts):  # type: ignore[no-untyped-def]
    """Drops repetitions from sorted runs, in place; returns how many hashes are left."""
    at = 0
    for i in range(starts.shape[0] - 1):
        out_starts[i] = at
        for k in range(starts[i], starts[i + 1]):
            if k == starts[i] or hashes[k] != hashes[at - 1]:
                hashes[at] = hashes[k]
                at += 1
    out_starts[starts.shape[0] - 1] = at
    return at


@njit(cache=True, nogil=True)
def _jaccard(left, left_starts, right, right_starts, pairs, out):  # type: ignore[no-untyped-def]
    for p in range(pairs.shape[0]):
        i, end_i = left_starts[pairs[p, 0]], left_starts[pairs[p, 0] + 1]
        k, end_k = right_starts[pairs[p, 1]], right_starts[pairs[p, 1] + 1]
        total, common = end_i - i + end_k - k, 0
        while i < end_i and k < end_k:
            x, y = left[i], right[k]
            common += x == y
            i += x <= y
            k += y <= x
        out[p] = common / (total - common)


def shingle_sets(
    flat: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], ngram: int, rows: Rows | None = None
) -> tuple[Hashes, Rows]:
    """Sorted sets of shingles of all documents, or of ``rows``: ``(hashes, starts)`` as from ``shingle``."""
    hashes, starts = shingle(flat, offsets, ngram, rows)
    for i in range(len(starts) - 1):
        hashes[starts[i] : starts[i + 1]].sort()
    out_starts = np.empty_like(starts)
    left = _squeeze(hashes, starts, out_starts)
    return hashes[:left], out_starts


def set_jaccard(
    left: Hashes, left_starts: Rows, right: Hashes, right_starts: Rows, pairs: Rows
) -> npt.NDArray[np.float64]:
    """Jaccard indices [p] of ``pairs`` [p, 2]: a set on the left, a set on the right, by place. No set is empty."""
    out = np.empty(len(pairs), dtype=np.float64)
    _jaccard(left, left_starts, right, right_starts, pairs, out)
    return out


def jaccard(
    flat: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], pairs: Rows, ngram: int = 5
) -> npt.NDArray[np.float64]:
    """Exact Jaccard indices [p] of ``pairs`` [p, 2] of documents flat[offsets[i]:offsets[i + 1]], in memory."""
    rows, places = np.unique(pairs, return_inverse=True)
    hashes, starts = shingle_sets(flat, offsets, ngram, rows)
    return set_jaccard(hashes, starts, hashes, starts, places.reshape(-1, 2).astype(np.int64))
