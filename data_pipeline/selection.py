"""Which documents a dataset holds: a fair share of each source under the cap, two splits.

Every choice depends on content hashes and the seed, never on the order in which files were met. It is made from the
documents' sizes alone; no text is in memory.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def ranks(keys: npt.NDArray[np.uint8], seed: int, purpose: bytes = b"order") -> npt.NDArray[np.uint64]:
    """Place of each document in a seeded hash order, uint64 [n], from its content hash, uint8 [n, 16].

    Two of 10^8 documents have equal ranks in one of 4000 builds; ties are broken by the content hash.
    """
    secret = seed.to_bytes(8, "little", signed=True)
    digest = (hashlib.blake2b(key, digest_size=8, key=secret, person=purpose).digest() for key in map(bytes, keys))
    return np.frombuffer(b"".join(digest), dtype="<u8").astype(np.uint64)


def in_order(keys: npt.NDArray[np.uint8], seed: int) -> Rows:
    """Row numbers int64 [n] in the seeded hash order of their content; equal content stays in order of row."""
    high, low = (keys.view("<u8")[:, half] for half in (0, 1)) if len(keys) else (np.empty(0), np.empty(0))
    return np.lexsort((low, high, ranks(keys, seed))).astype(np.int64)


def water_level(sizes: list[int], cap: int) -> int:
    """Largest level L with sum(min(size, L)) <= cap: what every source may keep, in the units of ``sizes``."""
    left = cap
    for place, size in enumerate(sorted(sizes)):
        share = left // (len(sizes) - place)
        if size > share:
            return share
        left -= size
    return max(sizes, default=0)


def under_cap(order: Rows, sizes: Rows, sources: Rows, cap: int) -> Rows:
    """Those of ``order`` (rows in hash order) that fit ``cap`` bytes, still in hash order.

    Under the cap everything is kept. Above it, each source keeps the documents that come first in the hash order up to
    a common level (max-min fair share); then the next document of each source is added, in hash order, where the cap
    has room.

    Args:
        order: int64 [m], rows to choose from.
        sizes, sources: int64 [n], bytes and source of every row.
    """
    offered = np.bincount(sources[order], weights=sizes[order].astype(np.float64)).astype(np.int64)
    level = water_level([int(size) for size in offered if size], cap)
    place = np.arange(len(order))
    by_source = np.lexsort((place, sources[order]))
    mine, size = sources[order][by_source], sizes[order][by_source]
    total = np.cumsum(size)
    first = np.flatnonzero(np.diff(mine, prepend=-1))
    before = np.repeat(total[first] - size[first], np.diff(first, append=len(mine)))
    over = total - before > level
    kept = np.zeros(len(order), dtype=np.bool_)
    kept[by_source[~over]] = True
    crossing = np.flatnonzero(over & ~np.concatenate(([False], over[:-1] & (mine[1:] == mine[:-1]))))
    room = cap - int(size[~over].sum())
    for one in sorted(by_source[crossing].tolist()):
        if sizes[order[one]] <= room:
            kept[one] = True
            room -= int(sizes[order[one]])
    return order[kept]


def split_heldout(rows: Rows, keys: npt.NDArray[np.uint8], fraction: float, seed: int) -> tuple[Rows, Rows]:
    """``(train, heldout)`` of ``rows``, both non-empty and in the given order; at least two rows are needed.

    A document's side depends on its hash and ``seed``. If the fraction leaves one side empty, the document nearest to
    the boundary changes sides.
    """
    assert len(rows) >= 2
    draw = ranks(keys[rows], seed, b"heldout") / 2.0**64
    heldout = draw < fraction
    if not heldout.any():
        heldout[np.argmin(draw)] = True
    elif heldout.all():
        heldout[np.argmax(draw)] = False
    return rows[~heldout], rows[heldout]
