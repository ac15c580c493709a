"""The mask compiler's intermediate form: per query row, a union of key intervals (never an L x L array).

A *run* is a stretch of tokens with equal document, segment and type class. Legality between runs is one table look-up,
so the legal keys of a run are a short list of merged intervals; a row clips them by causality and by its local pattern:

    keys(q) = { runs legal for q } ∩ pattern(q)   ∪   { non-causal runs of q } ∩ [q+1, q+w-1]   ∪   { q }

A summary of tokens [first, last] is visible to q iff last < q, the local pattern does not read all of them, and every
one of them is legal for q when the pattern is ignored: a staircase over the same intervals.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.rules import BoolTable, CompiledRules, token_types

IntArray = npt.NDArray[np.int64]
Records = npt.NDArray[np.integer[Any]]

#: Upper bound of the temporary run x run table; longer run lists are processed in slices of queries.
_SLICE = 1 << 22


@dataclass(frozen=True)
class Rows:
    """Disjoint, ascending intervals [lo, hi) of many rows, sorted by (row, lo): three int64 [n] arrays."""

    row: IntArray
    lo: IntArray
    hi: IntArray

    def of(self, row: int) -> IntArray:
        """Intervals of one row: int64 [n, 2]."""
        first, last = np.searchsorted(self.row, (row, row + 1))
        return np.stack([self.lo[first:last], self.hi[first:last]], axis=1)

    def between(self, first_row: int, last_row: int) -> Rows:
        """The rows [first_row, last_row), renumbered from 0."""
        a, b = np.searchsorted(self.row, (first_row, last_row))
        return Rows(self.row[a:b] - first_row, self.lo[a:b], self.hi[a:b])

    def keep_started(self, row_hi: IntArray) -> Rows:
        """Drops intervals that start where their row has already ended."""
        keep = self.lo < row_hi[self.row]
        return Rows(self.row[keep], self.lo[keep], self.hi[keep])

    def count(self) -> int:
        """Number of edges."""
        return int((self.hi - self.lo).sum())

    def scaled(self, factor: int) -> Rows:
        """Every key stands for ``factor`` consecutive keys."""
        return self if factor == 1 else Rows(self.row, self.lo * factor, self.hi * factor)

    def shifted(self, rows: int, keys: int) -> Rows:
        """Adds to the numbers of all rows and of all keys."""
        return Rows(self.row + rows, self.lo + keys, self.hi + keys)

    def minus(self, other: Rows) -> Rows:
        """The keys of each row that ``other`` does not have."""
        edges = [(self.row, self.lo, 1), (self.row, self.hi, -1), (other.row, other.lo, -2), (other.row, other.hi, 2)]
        row, at = (np.concatenate(columns) for columns in zip(*((r, k) for r, k, _ in edges), strict=True))
        step = np.concatenate([np.full(len(r), weight) for r, _, weight in edges])
        order = np.lexsort((at, row))
        # At most one interval of each side covers a key: the running sum is 1 exactly where only ``self`` does.
        row, at, cover = row[order], at[order], np.cumsum(step[order])
        keep = (cover[:-1] == 1) & (row[1:] == row[:-1]) & (at[1:] > at[:-1])
        return Rows(row[:-1][keep], at[:-1][keep], at[1:][keep])

    def dense(self, rows: int, first_key: int, last_key: int) -> BoolTable:
        """bool [rows, last_key - first_key]: the edges into keys [first_key, last_key)."""
        lo = np.clip(self.lo, first_key, last_key) - first_key
        hi = np.clip(self.hi, first_key, last_key) - first_key
        keep = hi > lo
        steps = np.zeros((rows, last_key - first_key + 1), dtype=np.int8)
        # Intervals of a row are disjoint: starts do not repeat, nor do ends, though one may end where another starts.
        steps[self.row[keep], lo[keep]] = 1
        steps[self.row[keep], hi[keep]] -= 1
        return np.cumsum(steps[:, :-1], axis=1, dtype=np.int8).view(np.bool_)


@dataclass(frozen=True)
class Intervals:
    """Legal keys of every query row of one sample, by runs.

    length: L; pattern: geometry of the local tier.
    run_lo, run_hi: int64 [R] bounds of the query runs; padding: bool [R], the run belongs to no document; run_self:
    bool [R], the run's tokens may read each other.
    past, future: per run (``row`` = run index) the merged runs legal before and after a query.
    """

    length: int
    pattern: LocalPattern
    run_lo: IntArray
    run_hi: IntArray
    padding: BoolTable
    run_self: BoolTable
    past: Rows
    future: Rows

    @cached_property
    def rows(self) -> Rows:
        """Legal keys of each query row: merged, disjoint, pattern and causality applied."""
        q, lo, hi = expanded(self.past, self.run_lo, self.run_hi)
        parts = [(q, np.maximum(lo, first), np.minimum(hi, last)) for first, last in self.pattern.pieces(q)]
        if len(self.future.row):
            q, lo, hi = expanded(self.future, self.run_lo, self.run_hi)
            parts.append((q, np.maximum(lo, q + 1), np.minimum(hi, q + self.pattern.after(self.length))))
        alone = np.flatnonzero(~self.run_self & ~self.padding)
        if len(alone):
            q = spans(self.run_lo[alone], (self.run_hi - self.run_lo)[alone])
            parts.append((q, q, q + 1))
        row, lo, hi = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        keep = hi > lo
        return merged(row[keep], lo[keep], hi[keep])

    def summary_rows(self, block_size: int, behind: int = 0) -> Rows:
        """Visible summaries of each query row, in units of blocks of ``block_size`` tokens.

        ``behind``: whole blocks that must lie between a block and the query's own for it to be visible.
        """
        q, lo, hi = expanded(self.past, self.run_lo, self.run_hi)
        first, last = -(-lo // block_size), np.minimum(hi // block_size, q // block_size - behind)
        parts = []
        # Visible is what lies before and between the pieces; a block that a piece holds in full is read directly.
        gap = first
        for piece_lo, piece_hi in self.pattern.pieces(q):
            covered = -(-piece_lo // block_size)
            parts.append((q, gap, np.minimum(last, covered)))
            gap = np.maximum(first, np.maximum(covered, piece_hi // block_size))
        row, lo, hi = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        keep = np.flatnonzero(hi > lo)
        return merged(row[keep], lo[keep], hi[keep])

    def wholly_legal(self, row: IntArray, lo: IntArray, hi: IntArray) -> BoolTable:
        """bool [n]: every token of [lo, hi) is legal for run ``row``, pattern and order ignored."""
        stride = self.length + 1
        starts, stops = self.past.row * stride + self.past.lo, self.past.row * stride + self.past.hi
        at = np.searchsorted(starts, row * stride + lo, side="right")
        # Runs are apart by more than a length, so an interval of another run ends before this one begins.
        reached: BoolTable = np.append(-1, stops)[at] >= row * stride + hi
        return reached


def compile_intervals(records: Records, rules: CompiledRules, pattern: LocalPattern) -> Intervals:
    """Compiles the records [L, >= 4] of one sample. Cost and memory follow runs and intervals, not L squared."""
    assert records.ndim == 2 and records.shape[1] >= 4, records.shape
    length = len(records)
    keys = run_keys(records, rules)
    run_lo = keys[:, 0]
    run_hi = np.append(run_lo[1:], length)
    kind = token_types(records[run_lo])
    past, future, run_self = _legal_runs(run_lo, run_hi, keys[:, 1], keys[:, 2], kind, rules)
    return Intervals(length, pattern, run_lo, run_hi, keys[:, 1] < 0, run_self, past, future)


def run_keys(records: Records, rules: CompiledRules) -> IntArray:
    """int64 [R, 4] = (first token, document, segment, type class) of each run; equal keys mean equal masks."""
    assert len(records), "a mask needs at least one token, and these records hold none"
    role = records[:, 2]
    assert role.min() >= 0 and role.max() < len(rules.roles), f"roles {role.min()}..{role.max()} of {len(rules.roles)}"
    fields = np.empty((len(records), 3), dtype=np.int64)
    fields[:, :2] = records[:, :2]
    fields[:, 2] = rules.type_class[token_types(records)]
    change = np.empty(len(records), dtype=np.bool_)
    change[:1] = True
    np.any(fields[1:] != fields[:-1], axis=1, out=change[1:])
    starts = np.flatnonzero(change)
    return np.concatenate([starts[:, None], fields[starts]], axis=1)


def _legal_runs(
    run_lo: IntArray,
    run_hi: IntArray,
    document: IntArray,
    segment: IntArray,
    kind: npt.NDArray[np.int32],
    rules: CompiledRules,
) -> tuple[Rows, Rows, BoolTable]:
    """-> (past, future, run reads itself). Slices of query runs keep the temporary table small."""
    runs = len(run_lo)
    shared = rules.shared[kind]
    past, future = [], []
    run_self = np.empty(runs, dtype=np.bool_)
    step = max(1, _SLICE // max(1, runs))
    for at in range(0, runs, step):
        q = slice(at, at + step)
        same_segment = segment[q, None] == segment
        document_ok = (document[q, None] == document) & (document >= 0)
        table = rules.table[kind[q, None], kind]
        legal = document_ok & table & (same_segment | shared)
        run_self[q] = legal[np.arange(legal.shape[0]), np.arange(at, at + legal.shape[0])]
        past.append(_merged_runs(legal, at, run_lo, run_hi).keep_started(run_hi))
        if not rules.causal:
            later = document_ok & table & same_segment & rules.noncausal[kind[q, None], kind]
            future.append(_merged_runs(later, at, run_lo, run_hi))
    return concatenated(past), concatenated(future), run_self


def _merged_runs(legal: BoolTable, first_row: int, run_lo: IntArray, run_hi: IntArray) -> Rows:
    """Neighbouring legal runs of each row become one interval."""
    row, start, stop = stretches(legal)
    return Rows(row + first_row, run_lo[start], run_hi[stop - 1])


def stretches(table: BoolTable) -> tuple[IntArray, IntArray, IntArray]:
    """-> (row, start, stop) of each maximal stretch [start, stop) of True in the rows of a table, in their order."""
    padded = np.zeros((table.shape[0], table.shape[1] + 2), dtype=np.int8)
    padded[:, 1:-1] = table
    step = np.diff(padded, axis=1)
    row, start = np.nonzero(step == 1)
    return row, start, np.nonzero(step == -1)[1]


def concatenated(parts: list[Rows]) -> Rows:
    """All intervals of all parts, in their order."""
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return Rows(empty, empty, empty)
    return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("row", "lo", "hi")))


def spans(first: IntArray, count: IntArray) -> IntArray:
    """Concatenation of arange(first_i, first_i + count_i)."""
    offset: IntArray = np.repeat(first - np.cumsum(count) + count, count)
    offset += np.arange(len(offset))
    return offset


def expanded(runs: Rows, run_lo: IntArray, run_hi: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """One (query, lo, hi) for each query of each (run, interval) pair whose interval starts before the run ends."""
    first = run_lo[runs.row]
    size = run_hi[runs.row] - first
    return spans(first, size), np.repeat(runs.lo, size), np.repeat(runs.hi, size)


def merged(row: IntArray, lo: IntArray, hi: IntArray) -> Rows:
    """Sorts by (row, lo) and joins adjacent intervals; the inputs are disjoint within a row."""
    order = np.lexsort((lo, row))
    row, lo, hi = row[order], lo[order], hi[order]
    joins = (row[1:] == row[:-1]) & (lo[1:] == hi[:-1])
    start = np.append(True, ~joins)[: len(row)]
    stop = np.append(~joins, True)[: len(row)]
    return Rows(row[start], lo[start], hi[stop])
