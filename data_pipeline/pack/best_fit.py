"""Packs pieces of documents into sequences that are exactly full, cutting as few documents as can be.

Best-fit decreasing over bins of one capacity (Ding et al. 2024, "Fewer Truncations Improve Language Modeling",
arXiv:2404.10830) leaves small gaps. Training takes a plain mean over all tokens, so a gap may not be padded. The
emptiest bins are therefore taken apart again and their pieces, shortest first, laid end to end into the gaps of the
fuller ones, cut where a gap ends. Of T tokens this makes floor(T / capacity) sequences, the most there can be; each gap
cuts at most one document, and the longest of the pieces taken apart are the ones that stay over whole.

A piece is a row of int64 (store, first token in that store, tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from data_pipeline.pack.order import hashed

Ints = npt.NDArray[np.int64]
#: Pieces that are sorted and placed together; bounds memory and, with it, how far apart packed documents may stand.
WINDOW = 1_000_000


@dataclass(frozen=True)
class Packing:
    """``pieces`` int64 [p, 3] in the order of their sequences; ``starts`` int64 [sequences + 1], first piece of each
    sequence and the total; ``left`` int64 [q, 3]: pieces, whole or the rest of a cut one, in no sequence; ``cut``:
    pieces that were cut."""

    pieces: Ints
    starts: Ints
    left: Ints
    cut: int


def pack(pieces: Ints, capacity: int, key: str, window: int = WINDOW) -> Packing:
    """Packs ``pieces`` int64 [n, 3], none longer than ``capacity``, into sequences of ``capacity`` tokens.

    Each ``window`` of pieces is packed on its own, with what the one before left over, in the given order. Within a
    sequence the pieces stand in an order by hash with ``key``: best fit itself would put the longest first always.
    """
    packed, sequences, counts, cut = [_none()], [np.empty(0, dtype=np.int64)], 0, 0
    left = _none()
    for low in range(0, len(pieces), window):
        placed, number, left, more, made = _pack_window(np.concatenate([left, pieces[low : low + window]]), capacity)
        packed.append(placed)
        sequences.append(number + counts)
        counts += made
        cut += more
    return _ordered(np.concatenate(packed), np.concatenate(sequences), counts, left, cut, key)


def pack_with(whole: Ints, fillers: Ints, capacity: int, key: str) -> tuple[Packing, Ints]:
    """Packs ``whole`` pieces, of which none is cut, and fills every gap with ``fillers`` in the given order.

    Returns the packing, whose ``left`` holds fillers only, and the pieces of ``whole`` that had to stay out because the
    fillers did not suffice: those of the emptiest bins.
    """
    bins, fill = _bins(whole, capacity)
    fullest = np.argsort(-fill, kind="stable")
    enough = np.cumsum(capacity - fill[fullest]) <= fillers[:, 2].sum()
    kept = fullest[: np.count_nonzero(enough)]
    number = np.full(len(fill), -1, dtype=np.int64)
    number[kept] = np.arange(len(kept))
    placed = number[bins]
    pieces, gaps, left, cut = fill_gaps(capacity - fill[kept], fillers)
    together = np.concatenate([whole[placed >= 0], pieces])
    packing = _ordered(together, np.concatenate([placed[placed >= 0], gaps]), len(kept), left, cut, key)
    return packing, whole[placed < 0]


def fill_needed(whole: Ints, capacity: int) -> int:
    """Tokens of filler that ``pack_with`` needs to keep all of ``whole``."""
    _, fill = _bins(whole, capacity)
    return int((capacity - fill).sum())


def fill_gaps(gaps: Ints, fillers: Ints) -> tuple[Ints, Ints, Ints, int]:
    """Lays ``fillers`` int64 [n, 3] end to end into ``gaps`` int64 [g], cutting at the end of a gap.

    The fillers must suffice. Returns the parts [p, 3] and the gap of each [p]; what is left [q, 3]; and how many
    fillers were cut.
    """
    ends, borders = np.cumsum(fillers[:, 2]), np.cumsum(gaps)
    need = int(borders[-1]) if len(gaps) else 0
    assert need <= (int(ends[-1]) if len(ends) else 0)
    edges = np.unique(np.concatenate([[0], ends[ends < need], borders]))
    low = edges[:-1]
    source = np.searchsorted(ends, low, side="right")
    gap = np.searchsorted(borders, low, side="right")
    parts = fillers[source]
    parts[:, 1] += low - (ends - fillers[:, 2])[source]
    parts[:, 2] = np.diff(edges)
    first = int(np.searchsorted(ends, need, side="right"))
    left = fillers[first:].copy()
    used = np.bincount(source, minlength=len(fillers))
    if len(left):
        taken = need - int(ends[first] - fillers[first, 2])
        left[0, 1:] += (taken, -taken)
        used[first] += 1  # the rest of a cut piece is a part, too; an untouched one counts one all the same
    return parts, gap, left, int(np.count_nonzero(used > 1))


def _pack_window(pieces: Ints, capacity: int) -> tuple[Ints, Ints, Ints, int, int]:
    """(pieces placed, their sequences, pieces left, pieces cut, sequences)."""
    bins, fill = _bins(pieces, capacity)
    count = int(pieces[:, 2].sum()) // capacity
    kept = np.argsort(-fill, kind="stable")[:count]
    number = np.full(len(fill), -1, dtype=np.int64)
    number[kept] = np.arange(count)
    placed = number[bins]
    loose = pieces[placed < 0]
    parts, gaps, left, cut = fill_gaps(capacity - fill[kept], loose[np.argsort(loose[:, 2], kind="stable")])
    together = np.concatenate([pieces[placed >= 0], parts])
    return together, np.concatenate([placed[placed >= 0], gaps]), left, cut, count


def _bins(pieces: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Best-fit decreasing: the bin of each piece, int64 [n], and the tokens in each bin, int64 [bins]."""
    lengths = pieces[:, 2]
    assert not len(lengths) or (lengths.min() >= 1 and lengths.max() <= capacity)
    order = np.argsort(-lengths, kind="stable")
    bins = np.empty(len(lengths), dtype=np.int64)
    bins[order] = best_fit(lengths[order], capacity)
    fill = np.zeros(int(bins.max()) + 1 if len(bins) else 0, dtype=np.int64)
    np.add.at(fill, bins, lengths)
    return bins, fill


def _ordered(pieces: Ints, sequence: Ints, count: int, left: Ints, cut: int, key: str) -> Packing:
    order = np.lexsort((hashed(pieces[:, 1], key), sequence))
    starts = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(np.bincount(sequence, minlength=count), out=starts[1:])
    return Packing(pieces[order], starts, left, cut)


def _none() -> Ints:
    return np.empty((0, 3), dtype=np.int64)


@njit(cache=True, nogil=True)
def best_fit(lengths: Any, capacity: Any) -> Any:
    """The bin of each length, int64 [n], placed in the given order into the fullest bin that has room for it.

    Among bins of equal room the one touched last is taken. ``tree`` is a segment tree over amounts of room: a node is
    set where some bin has room within its range. ``newest`` and ``older`` chain the bins of equal room.
    """
    size = 1
    while size <= capacity:
        size *= 2
    tree = np.zeros(2 * size, dtype=np.bool_)
    newest = np.full(capacity + 1, -1, dtype=np.int64)
    older = np.empty(len(lengths), dtype=np.int64)
    bins = np.empty(len(lengths), dtype=np.int64)
    count = 0
    for i in range(len(lengths)):
        node = size + lengths[i]
        if not tree[node]:
            while node > 1 and not (node % 2 == 0 and tree[node + 1]):  # up to the next greater range that has a bin
                node //= 2
            node += 1 if node > 1 else 0
        if node <= 1:
            chosen, room = count, capacity
            count += 1
        else:
            while node < size:  # down to its least room
                node = 2 * node if tree[2 * node] else 2 * node + 1
            room = node - size
            chosen = newest[room]
            newest[room] = older[chosen]
            if newest[room] < 0:
                tree[node] = False
                node //= 2
                while node >= 1 and not (tree[2 * node] or tree[2 * node + 1]):
                    tree[node] = False
                    node //= 2
        bins[i] = chosen
        room -= lengths[i]
        if room > 0:
            older[chosen] = newest[room]
            newest[room] = chosen
            node = size + room
            while node >= 1 and not tree[node]:
                tree[node] = True
                node //= 2
    return bins
