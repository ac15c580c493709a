"""Locality-sensitive hashing by bands (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4).

A signature is cut into b bands of r places; documents that agree in all places of a band share that band's key and
meet in a group. A pair of Jaccard index J so meets with probability 1 - (1 - J^r)^b.

Outside memory: each shard's rows (key, document) are sorted by key; a partition is a range of keys, which is one
slice of every shard's rows, so a step holds one partition.

Large groups. m copies of one text meet in a group of m(m - 1)/2 pairs. Which document survives needs no more than
this: any two survivors of a group were compared, and whatever was removed was compared with the survivor
(``cluster``). A group of at most ``WHOLE_GROUP`` is compared whole. Of a larger one, its first document by rank is
compared with all the others; then, after removing, so are the next of its members that still stand and were not yet
compared with all, until at most one such is left. The result is that of comparing all pairs; copies of a template
cost m comparisons, and only m documents that share a band without being duplicates still cost m^2/2.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit, uint32, uint64

#: Groups up to this size are compared whole.
WHOLE_GROUP = 32
#: Rows of a partition, about; bounds the memory of ``group_pairs``.
PARTITION_ROWS = 1 << 19
#: Pairs that one large group may add in one round.
GROUP_PAIRS = 1 << 21

Rows = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


@njit(cache=True, nogil=True)
def _band_keys(signatures, documents, bands, width, out):  # type: ignore[no-untyped-def]
    for i in range(documents.shape[0]):
        signature = signatures[documents[i]]
        for band in range(bands):
            state = uint64(band + 1) * uint64(0x9E3779B97F4A7C15)
            for k in range(band * width, (band + 1) * width):
                state = (state ^ uint64(uint32(signature[k]))) * uint64(0xFF51AFD7ED558CCD)
                state ^= state >> uint64(32)
            out[i, band] = state


def band_keys(signatures: npt.NDArray[np.uint32], bands: int, rows: int, documents: Rows | None = None) -> Keys:
    """64-bit keys [documents, bands] of signatures [n, >= bands * rows]; equal bands have equal keys."""
    assert bands >= 1 and rows >= 1 and signatures.shape[1] >= bands * rows
    chosen = np.arange(len(signatures)) if documents is None else documents
    out = np.empty((len(chosen), bands), dtype=np.uint64)
    _band_keys(np.ascontiguousarray(signatures), chosen, bands, rows, out)
    return out


def sorted_rows(keys: Keys, documents: Rows) -> tuple[Keys, Rows]:
    """``(keys, documents)`` [documents * bands], sorted by key, then document."""
    flat, owners = keys.ravel(), np.repeat(documents, keys.shape[1])
    order = np.lexsort((owners, flat))
    return flat[order], owners[order]


def partitions_for(rows: int) -> int:
    """Partitions, a power of two, for so many rows in all."""
    return 1 << max(0, (rows - 1) // PARTITION_ROWS).bit_length()


def partition_slice(keys: Keys, partition: int, partitions: int) -> slice:
    """Which of a shard's sorted rows have a key in the partition's range."""
    width = (1 << 64) // partitions
    first = int(np.searchsorted(keys, np.uint64(partition * width), "left"))
    last = int(np.searchsorted(keys, np.uint64((partition + 1) * width - 1), "right"))
    return slice(first, last)


def groups(keys: Keys, documents: Rows, ranks: Rows) -> tuple[Rows, Rows]:
    """``(members, starts)``: the groups of two or more of one partition's rows, each sorted by rank.

    Group g is members[starts[g]:starts[g + 1]]; they lie in order of key. ``ranks`` is that of each row's document.
    """
    order = np.lexsort((ranks, keys))
    keys, documents = keys[order], documents[order]
    fresh = np.ones(len(keys) + 1, dtype=np.bool_)
    fresh[1:-1] = keys[1:] != keys[:-1]
    edges = np.flatnonzero(fresh)
    sizes = np.diff(edges)
    kept = sizes > 1
    starts = np.concatenate([[0], np.cumsum(sizes[kept])]).astype(np.int64)
    return documents[np.repeat(kept, sizes)], starts


@njit(cache=True, nogil=True)
def _pairs(members, starts, standing, done, whole, first, most, out):  # type: ignore[no-untyped-def]
    """With room in ``out``: fills it in, marks ``done`` and returns the pairs; without: returns how many at most."""
    count = 0
    for g in range(starts.shape[0] - 1):
        start, end = starts[g], starts[g + 1]
        size = end - start
        open_members = 0  # standing, and not yet compared with all: one alone has nothing left to be compared with
        for i in range(start, end):
            if standing[members[i]] and not done[i]:
                open_members += 1
        if open_members < 2:
            continue
        heads = size if size <= whole else (1 if first else max(1, most // size))
        if out.shape[0] == 0:
            count += min(heads, open_members) * (size - 1)
            continue
        for i in range(start, end):
            if heads == 0:
                break
            if not standing[members[i]] or done[i]:
                continue
            heads -= 1
            done[i] = True
            for k in range(start, end):
                if not done[k]:
                    out[count, 0] = min(members[i], members[k])
                    out[count, 1] = max(members[i], members[k])
                    count += 1
    return count


def group_pairs(
    members: Rows,
    starts: Rows,
    standing: npt.NDArray[np.bool_],
    done: npt.NDArray[np.bool_],
    first: bool,
    whole: int = WHOLE_GROUP,
    most: int = GROUP_PAIRS,
) -> Rows:
    """The pairs int64 [p, 2] that a round compares, a < b, sorted, each once; marks ``done`` in place.

    ``standing`` [documents]: not removed so far; ``done`` [members]: compared with all of its group. Of a group larger
    than ``whole`` only one member is compared in the ``first`` round; later, so many that it adds ``most`` pairs.
    """
    room = _pairs(members, starts, standing, done, whole, first, most, np.empty((0, 2), dtype=np.int64))
    if room == 0:
        return np.empty((0, 2), dtype=np.int64)
    out = np.empty((room, 2), dtype=np.int64)
    return unique_pairs(out[: _pairs(members, starts, standing, done, whole, first, most, out)])


def unique_pairs(pairs: Rows) -> Rows:
    """``pairs`` [p, 2] sorted, each once. Rows are below 2^31.5, so that a pair fits one integer."""
    if not len(pairs):
        return pairs
    width = int(pairs.max()) + 1
    codes = np.unique(pairs[:, 0] * width + pairs[:, 1])
    return np.stack([codes // width, codes % width], axis=1)


def candidate_pairs(signatures: npt.NDArray[np.uint32], bands: int, rows: int) -> Rows:
    """All pairs int64 [p, 2] (a < b, sorted) of signatures that share a band, in memory: m^2/2 of m that share one.

    For small corpora and measurements; the build's stages make only the pairs they need.
    """
    documents = np.arange(len(signatures))
    keys, owners = sorted_rows(band_keys(signatures, bands, rows), documents)
    members, starts = groups(keys, owners, owners)
    none_done = np.zeros(len(members), dtype=np.bool_)
    return group_pairs(members, starts, np.ones(len(documents), np.bool_), none_done, True, whole=len(documents))
