"""Interval arithmetic of query blocks: what all rows of a block share, what a tree of blocks takes, what is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from refractor_megatron.distinction.intervals import IntArray, spans
from refractor_megatron.fabric.joint import SampleKeys

Range = tuple[int, int]
#: A node of a tree: blocks [first, last) and the ranges of keys that it visits.
Node = tuple[int, int, list[Range]]

#: Gaps of at most this many keys are visited rather than split: one more range costs more than 32 keys.
GAP = 32
#: A leaf with tokens visits a multiple of this many keys where it can: vector units dislike the rest.
ALIGN = 16
#: Fewest keys for which an unmasked visit is worth merging one more result.
CORE = 64


class Shape(NamedTuple):
    """Sizes of the rectangle that is laid out; ``keys`` counts the joint space."""

    rows: int
    n_far: int
    keys: int
    q_block: int

    @property
    def blocks(self) -> int:
        """Query blocks."""
        return -(-self.rows // self.q_block)

    @property
    def stride(self) -> int:
        """Distance of two blocks on a line where intervals of different blocks must stay apart."""
        return self.keys + GAP + 1

    def rows_of(self, first: int, last: int) -> Range:
        """Query rows of blocks [first, last)."""
        return first * self.q_block, min(last * self.q_block, self.rows)


class Pieces(NamedTuple):
    """Intervals of keys on the line of all blocks, where block j's key ``x`` stands at ``j * stride + x``.

    owner: ``table * q_block + row`` of the sample and of the row in its block; start, stop: places [start, stop).
    """

    owner: IntArray
    start: IntArray
    stop: IntArray

    def take(self, index: IntArray) -> Pieces:
        """A selection."""
        return Pieces(self.owner[index], self.start[index], self.stop[index])


def pieces_of(samples: Sequence[SampleKeys], shape: Shape) -> tuple[Pieces, Pieces]:
    """All intervals of the samples' rows: those of far keys, and those of tokens."""
    parts = []
    for table, sample in enumerate(samples):
        row, lo, hi = sample.rows.row, sample.rows.lo, sample.rows.hi
        assert not ((lo < shape.n_far) & (hi > shape.n_far)).any(), "an interval spans far keys and tokens"
        block = row // shape.q_block
        at = block * shape.stride
        parts.append((row + (table - block) * shape.q_block, at + lo, at + hi, lo < shape.n_far))
    owner, start, stop, is_far = (np.concatenate(column) for column in zip(*parts, strict=True))
    pieces = Pieces(owner, start, stop)
    return pieces.take(np.flatnonzero(is_far)), pieces.take(np.flatnonzero(~is_far))


def cores(halves: Sequence[Pieces], shape: Shape, tables: int) -> list[list[Range]]:
    """Per block, the ranges of at least ``CORE`` keys that every row of all samples may read: a sweep over ends."""
    found: list[list[Range]] = [[] for _ in range(shape.blocks)]
    long = [half.take(np.flatnonzero(half.stop - half.start >= CORE)) for half in halves]
    # An event is twice its place, plus one for a start: where both meet, ends come first.
    events = np.concatenate([ends for half in long for ends in (half.start * 2 + 1, half.stop * 2)])
    events.sort()
    depth, place = np.cumsum((events & 1) * 2 - 1), events >> 1
    wide = np.flatnonzero(np.diff(place) >= CORE)
    for start, stop, rows in zip(place[wide].tolist(), place[wide + 1].tolist(), depth[wide].tolist(), strict=True):
        block, lo = divmod(start, shape.stride)
        first, last = shape.rows_of(block, block + 1)
        if rows == (last - first) * tables:
            found[block].append((lo, lo + stop - start))
    return found


def split(common: list[list[Range]]) -> tuple[list[Node], list[list[Range]]]:
    """One tree over blocks 0, 1, ... with the given cores -> its inner nodes that visit something, and per block the
    ranges (ascending) that the nodes above it have taken."""
    nodes: list[Node] = []
    taken: list[list[Range]] = [[] for _ in common]

    @cache
    def shared(a: int, b: int) -> list[Range]:
        if b - a == 1:
            return common[a]
        return _intersection(shared(a, _middle(a, b)), shared(_middle(a, b), b))

    def descend(a: int, b: int, above: list[Range]) -> None:
        if b - a == 1:
            taken[a] = above
            return
        own = [r for r in _difference(shared(a, b), above) if r[1] - r[0] >= CORE]
        if own:
            nodes.append((a, b, own))
        for child in ((a, _middle(a, b)), (_middle(a, b), b)):
            descend(*child, sorted(above + own))

    descend(0, len(common), [])
    return nodes, taken


def _middle(a: int, b: int) -> int:
    """Where a node over blocks [a, b) splits: its left child has a power of two of them."""
    return a + (1 << (b - a - 1).bit_length() - 1)


def _intersection(a: Sequence[Range], b: Sequence[Range]) -> list[Range]:
    """Common ranges of at least ``CORE`` keys of two ascending lists."""
    common, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        lo, hi = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if hi - lo >= CORE:
            common.append((lo, hi))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return common


def _difference(parts: Sequence[Range], taken: Sequence[Range]) -> list[Range]:
    """What is left of ascending ranges without other ascending ranges."""
    left, next_taken = [], 0
    for lo, hi in parts:
        while next_taken < len(taken) and taken[next_taken][1] <= lo:
            next_taken += 1
        at = next_taken
        while at < len(taken) and taken[at][0] < hi:
            if lo < taken[at][0]:
                left.append((lo, taken[at][0]))
            lo = taken[at][1]
            at += 1
        if lo < hi:
            left.append((lo, hi))
    return left


def without(pieces: Pieces, taken: Sequence[Sequence[Range]], shape: Shape) -> Pieces:
    """The pieces, cut down to the keys that no node above their block has taken."""
    if not any(taken):
        return pieces
    gaps = [(j, gap) for j, ranges in enumerate(taken) for gap in _difference([(0, shape.keys)], ranges)]
    start, stop = np.array([(j * shape.stride + lo, j * shape.stride + hi) for j, (lo, hi) in gaps], dtype=np.int64).T
    # A piece is copied for each gap of its block that it meets, and cut to it.
    first = np.searchsorted(stop, pieces.start, side="right")
    copies = np.searchsorted(start, pieces.stop, side="left") - first
    source = np.repeat(np.arange(len(copies)), copies)
    gap = spans(first, copies)
    pieces = pieces.take(source)
    return Pieces(pieces.owner, np.maximum(pieces.start, start[gap]), np.minimum(pieces.stop, stop[gap]))


def leaves(halves: Sequence[Pieces], shape: Shape) -> Iterator[tuple[int, list[Range], npt.NDArray[np.int32]]]:
    """Per block that has pieces: few ranges that cover them, ascending, and the pieces in columns of these ranges.

    halves: far pieces and token pieces. Yields (block, ranges, int32 [n, 4] = (table, row, first column, last column)).
    """
    covers = [_cover(half) for half in halves]
    start, stop, count = (np.concatenate([getattr(c, name) for c in covers]) for name in ("start", "stop", "held"))
    pieces = Pieces(*(np.concatenate(column) for column in zip(*(c.pieces for c in covers), strict=True)))
    # The far and the token ranges of a block become neighbours, and so do their pieces.
    order = np.argsort(start, kind="stable")
    pieces = pieces.take(spans((np.cumsum(count) - count)[order], count[order]))
    start, stop, count = start[order], stop[order], count[order]
    block = start // shape.stride
    bounds = np.searchsorted(block, np.arange(shape.blocks + 1))
    start = _rounded(start, stop, block, bounds, shape)
    offset = np.append(0, np.cumsum(stop - start))
    shift = np.repeat(offset[:-1] - offset[bounds[block]] - start, count)
    row = pieces.owner % shape.q_block
    left = np.empty((len(row), 4), dtype=np.int32)
    for column, values in enumerate((pieces.owner // shape.q_block, row, pieces.start + shift, pieces.stop + shift)):
        left[:, column] = values
    ranges = list(zip((start - block * shape.stride).tolist(), (stop - block * shape.stride).tolist(), strict=True))
    pieces_at = np.append(0, np.cumsum(count))[bounds].tolist()
    ranges_at = bounds.tolist()
    for j in range(shape.blocks):
        if ranges_at[j] < ranges_at[j + 1]:
            yield j, ranges[ranges_at[j] : ranges_at[j + 1]], left[pieces_at[j] : pieces_at[j + 1]]


def _rounded(start: IntArray, stop: IntArray, block: IntArray, bounds: IntArray, shape: Shape) -> IntArray:
    """Starts of all ranges, those of each block's first token range lowered until its keys are a multiple of ALIGN."""
    base = block * shape.stride + shape.n_far
    first = bounds[:-1] + np.bincount(block[start < base], minlength=shape.blocks)
    keys = np.append(0, np.cumsum(stop - start))[bounds]
    held = first < bounds[1:]
    first, missing = first[held], -np.diff(keys)[held] % ALIGN
    start = start.copy()
    start[first] -= np.minimum(missing, (start - base)[first])
    return start


class _Cover(NamedTuple):
    """Ranges [start, stop) of places, and the pieces sorted by start, ``held`` of them in each range."""

    start: IntArray
    stop: IntArray
    held: IntArray
    pieces: Pieces


def _cover(pieces: Pieces) -> _Cover:
    """Few ranges per block that cover all its pieces."""
    start = pieces.start
    n = len(start)
    if (start[1:] < start[:-1]).any():
        # Sorting numbers that carry their index is several times faster than a stable argsort.
        pieces = pieces.take(np.sort(start * n + np.arange(n)) % n)
        start = pieces.start
    reach = np.maximum.accumulate(pieces.stop)
    first = np.flatnonzero(np.append(True, start[1:] > reach[:-1] + GAP)[:n])
    bounds = np.append(first, n)
    return _Cover(start[first], reach[bounds[1:] - 1], np.diff(bounds), pieces)
