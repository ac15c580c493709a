"""Exact ground truth of near-duplicates: all pairs of sets with a Jaccard index of at least t, none missed.

Prefix filtering (Bayardo, Ma, Srikant, 2007, "Scaling up all pairs similarity search"): with tokens in order of rarity,
two sets that overlap in at least o tokens share one among the first |x| - o + 1 of x and |y| - o + 1 of y. What meets
in such a prefix is compared by merging both sets. Shares no code with the pipeline's own comparison.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Rows = npt.NDArray[np.int64]
#: Against rounding of t * n; far below 1 / n for any set here.
_SLACK = 1e-9


def token_sets(hashes: npt.NDArray[np.uint64], starts: Rows) -> tuple[npt.NDArray[np.int32], Rows]:
    """``(tokens, starts)``: each document's distinct hashes as numbers in order of rarity, sorted.

    ``hashes`` and ``starts`` as from ``data_pipeline.dedup.shingles.shingle``: repetitions, in any order.
    """
    _, codes = np.unique(hashes, return_inverse=True)
    pairs = np.unique(np.repeat(np.arange(len(starts) - 1), np.diff(starts)) << 32 | codes)
    owners, codes = pairs >> 32, pairs & 0xFFFFFFFF
    counts = np.bincount(codes)
    rarity = np.empty(len(counts), dtype=np.int64)
    rarity[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    tokens = rarity[codes]
    pairs = np.sort(owners << 32 | tokens)
    bounds = np.searchsorted(pairs >> 32, np.arange(len(starts)))
    return (pairs & 0xFFFFFFFF).astype(np.int32), bounds.astype(np.int64)


@njit(cache=True, nogil=True)
def _overlap(tokens, i, end_i, k, end_k):  # type: ignore[no-untyped-def]
    common = 0
    while i < end_i and k < end_k:
        if tokens[i] == tokens[k]:
            common += 1
            i += 1
            k += 1
        elif tokens[i] < tokens[k]:
            i += 1
        else:
            k += 1
    return common


@njit(cache=True, nogil=True)
def _search(tokens, starts, order, threshold, head, following, owner, met, out, scores):  # type: ignore[no-untyped-def]
    """Documents in ``order`` of size, so that lists hold no larger ones. Returns pairs found; stops when ``out`` is
    full."""
    used = found = 0
    for x in order:
        low, high = starts[x], starts[x + 1]
        size = high - low
        least = threshold * size - _SLACK
        prefix = size - int(np.ceil(least)) + 1
        for at in range(low, low + min(prefix, size)):
            posting = head[tokens[at]]
            while posting >= 0:
                y = owner[posting]
                other = starts[y + 1] - starts[y]
                if other < least:
                    break  # the list goes on with smaller ones
                posting = following[posting]
                if met[y] == x:
                    continue
                met[y] = x
                common = _overlap(tokens, low, high, starts[y], starts[y + 1])
                index = common / (size + other - common)
                if index >= threshold:
                    if found < out.shape[0]:
                        out[found, 0], out[found, 1] = min(x, y), max(x, y)
                        scores[found] = index
                    found += 1
        # as the smaller of two sets it must overlap in 2t / (1 + t) of its tokens
        prefix = size - int(np.ceil(2 * threshold / (1 + threshold) * size - _SLACK)) + 1
        for at in range(low, low + min(prefix, size)):
            owner[used], following[used] = x, head[tokens[at]]
            head[tokens[at]] = used
            used += 1
    return found


def all_pairs(tokens: npt.NDArray[Any], starts: Rows, threshold: float) -> tuple[Rows, npt.NDArray[np.float64]]:
    """``(pairs, jaccard)``: every pair int64 [p, 2] (a < b, sorted) of sets with an index >= ``threshold`` > 0.

    ``tokens`` and ``starts`` as from ``token_sets``; no set is empty.
    """
    assert 0 < threshold <= 1 and (np.diff(starts) > 0).all()
    documents, room = len(starts) - 1, 1 << 16
    order = np.argsort(np.diff(starts), kind="stable")
    while True:
        head = np.full(int(tokens.max(initial=-1)) + 1, -1, dtype=np.int32)
        following, owner = (np.empty(len(tokens), dtype=np.int32) for _ in range(2))
        met = np.full(documents, -1, dtype=np.int64)
        out, scores = np.empty((room, 2), dtype=np.int64), np.empty(room)
        found = _search(tokens, starts, order, threshold, head, following, owner, met, out, scores)
        if found <= room:
            break
        room = found  # once more, with room for all
    by_place = np.lexsort((out[:found, 1], out[:found, 0]))
    return out[:found][by_place], scores[:found][by_place]
