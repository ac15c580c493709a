"""Which query rows are looked at when a mask or an attention is measured: few, fixed, and alike on every grid."""

from __future__ import annotations

import numpy as np

from refractor_megatron.distinction.intervals import IntArray, Rows
from refractor_megatron.fabric.joint import JointSpace


def sampled_rows(count: int, space: JointSpace, seed: int = 0) -> IntArray:
    """Local numbers, ascending, of those of ``count`` rows of the whole sequence that ``space`` holds.

    One row from each of ``count`` equal parts of the sequence, every row where it has fewer. The place within a part
    follows the golden ratio, so that no block or chunk size is always met at the same place. None for a ``count`` of 0.
    """
    position = np.arange(space.length if count else 0)
    if 0 < count < space.length:
        edges = np.arange(count + 1) * space.length // count
        share = ((np.arange(count) + 1 + 7919 * seed) * 0.6180339887498949) % 1.0
        position = edges[:-1] + np.floor(share * np.diff(edges)).astype(np.int64)
    held, first = [], 0
    for start, stop in space.chunks:
        held.append(first + position[(position >= start) & (position < stop)] - start)
        first += stop - start
    return np.concatenate(held)


def select_rows(rows: Rows, chosen: IntArray) -> Rows:
    """The ascending rows ``chosen``, renumbered from 0."""
    keep = np.flatnonzero(np.isin(rows.row, chosen))
    return Rows(np.searchsorted(chosen, rows.row[keep]), rows.lo[keep], rows.hi[keep])
