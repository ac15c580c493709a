"""Which keys each block of queries visits: the block-sparse lowering of the interval form.

Keys of a sample live in one joint space [summaries | tokens]. A query block visits the union of its rows' intervals,
as a few contiguous ranges; inside the visited ranges an additive bias removes the illegal edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from refractor_megatron.distinction.intervals import Intervals, Rows

#: Gaps of at most this many keys are visited rather than split: one more op call costs more than 32 keys.
_GAP = 32
#: Ranges start at a multiple of this many keys, for vector loads.
_ALIGN = 16
#: One call serves all samples of a batch while this holds: visited(union) <= _UNION * visited(separately) ...
_UNION = 1.5
#: ... or when the batch is so small that the calls cost more than the pairs.
_SMALL = 1 << 16
#: Biases are kept on the layout up to this many elements (32 MiB in float32) and rebuilt on each use beyond.
_CACHED_BIAS = 8 << 20


@dataclass(frozen=True, eq=False, repr=False)
class SampleKeys:
    """Joint-space intervals of one sample's rows, and its counts."""

    rows: Rows
    dead: npt.NDArray[np.int64]
    edges: int


@dataclass(frozen=True, eq=False, repr=False)
class Visit:
    """One op call: queries [first, last) of ``samples`` (None = the whole batch) over the given key ranges.

    summaries, tokens: ranges [lo, hi) in their own index spaces. ``tables``: the distinct samples whose intervals mask
    this visit, one per sample, or a single one when all samples share it.
    """

    first: int
    last: int
    samples: tuple[int, ...] | None
    summaries: tuple[tuple[int, int], ...]
    tokens: tuple[tuple[int, int], ...]
    tables: tuple[SampleKeys, ...]

    @property
    def keys(self) -> int:
        """Number of keys visited by every query of the block."""
        return sum(hi - lo for lo, hi in (*self.summaries, *self.tokens))

    def size(self, batch: int) -> int:
        """Number of samples served, out of a batch."""
        return batch if self.samples is None else len(self.samples)


@dataclass(eq=False, repr=False)
class Layout:
    """All visits of a batch. ``n_summaries`` joint-space keys come before the tokens."""

    batch: int
    length: int
    n_summaries: int
    q_block: int
    visits: tuple[Visit, ...]
    legal_edges: int
    fully_masked_rows: int
    _bias: dict[tuple[int, torch.dtype, int], torch.Tensor | None] = field(default_factory=dict)

    @property
    def visited_pairs(self) -> int:
        """(query, key) pairs that the visits compute, masked ones included."""
        return sum((v.last - v.first) * v.keys * v.size(self.batch) for v in self.visits)

    @cached_property
    def _mask_elements(self) -> int:
        return sum((v.last - v.first) * v.keys * len(v.tables) for v in self.visits)

    def legal(self, index: int) -> npt.NDArray[np.bool_]:
        """bool [samples or 1, rows, keys] of one visit, in the order summaries, tokens."""
        visit = self.visits[index]
        rows = visit.last - visit.first
        masks = []
        for table in visit.tables:
            part = table.rows.between(visit.first, visit.last)
            shift = [(lo + self.n_summaries, hi + self.n_summaries) for lo, hi in visit.tokens]
            masks.append(np.concatenate([part.dense(rows, lo, hi) for lo, hi in (*visit.summaries, *shift)], axis=1))
        return np.stack(masks)

    def bias(self, index: int, dtype: torch.dtype, group: int) -> torch.Tensor | None:
        """Additive mask [samples or 1, 1, group * rows, keys] of 0 and -inf on the CPU, None when every edge is legal.

        Rows repeat ``group`` times, as the queries that share a key head are folded into rows.
        """
        key = (index, dtype, group)
        if key in self._bias:
            return self._bias[key]
        legal = torch.from_numpy(self.legal(index))
        bias = None
        if not bool(legal.all()):
            bias = torch.zeros(legal.shape, dtype=dtype).masked_fill_(~legal, float("-inf"))
            bias = bias.repeat(1, group, 1)[:, None] if group > 1 else bias[:, None]
        if group * self._mask_elements <= _CACHED_BIAS:
            self._bias[key] = bias
        return bias


def sample_keys(intervals: Intervals, block_size: int | None, per_block: int) -> SampleKeys:
    """Joint-space rows of one sample: summaries (when ``block_size`` is given), then tokens."""
    rows = intervals.rows
    length = intervals.length
    alive = np.zeros(length, dtype=np.bool_)
    alive[rows.row] = True
    if block_size is not None:
        offset = length // block_size * per_block
        seen = intervals.summary_rows(block_size).scaled(per_block)
        row = np.concatenate([seen.row, rows.row])
        lo = np.concatenate([seen.lo, rows.lo + offset])
        hi = np.concatenate([seen.hi, rows.hi + offset])
        order = np.argsort(row, kind="stable")
        rows = Rows(row[order], lo[order], hi[order])
    return SampleKeys(rows, np.flatnonzero(~alive), rows.count())


def build_layout(samples: Sequence[SampleKeys], length: int, n_summaries: int, q_block: int) -> Layout:
    """Lays out a batch; samples that are the same object share their masks."""
    shared = all(sample is samples[0] for sample in samples)
    distinct = tuple(samples[:1]) if shared else tuple(samples)
    visits: list[Visit] = []
    for first in range(0, length, q_block):
        last = min(first + q_block, length)
        visits += _visits_of_block(distinct, first, last, n_summaries, len(samples))
    return Layout(
        batch=len(samples),
        length=length,
        n_summaries=n_summaries,
        q_block=q_block,
        visits=tuple(visits),
        legal_edges=sum(sample.edges for sample in samples),
        fully_masked_rows=sum(len(sample.dead) for sample in samples),
    )


def _visits_of_block(
    samples: tuple[SampleKeys, ...], first: int, last: int, n_summaries: int, batch: int
) -> list[Visit]:
    parts = [sample.rows.between(first, last) for sample in samples]
    lo = np.concatenate([part.lo for part in parts])
    hi = np.concatenate([part.hi for part in parts])
    union = _visit(first, last, None, _cover(lo, hi, n_summaries), samples, n_summaries)
    if len(samples) == 1:
        return [union] if union.keys else []
    if union.keys * len(samples) * (last - first) <= _SMALL:
        return [union] if union.keys else []
    single = [
        _visit(first, last, (i,), _cover(part.lo, part.hi, n_summaries), (samples[i],), n_summaries)
        for i, part in enumerate(parts)
    ]
    if union.keys * batch <= _UNION * sum(visit.keys for visit in single):
        return [union] if union.keys else []
    return [visit for visit in single if visit.keys]


def _visit(
    first: int,
    last: int,
    samples: tuple[int, ...] | None,
    ranges: list[tuple[int, int]],
    tables: tuple[SampleKeys, ...],
    n_summaries: int,
) -> Visit:
    summaries = tuple((lo, hi) for lo, hi in ranges if hi <= n_summaries)
    tokens = tuple((lo - n_summaries, hi - n_summaries) for lo, hi in ranges if lo >= n_summaries)
    return Visit(first, last, samples, summaries, tokens, tables)


def _cover(lo: npt.NDArray[np.int64], hi: npt.NDArray[np.int64], n_summaries: int) -> list[tuple[int, int]]:
    """Few ranges that cover all intervals; none crosses from the summaries into the tokens."""
    ranges: list[tuple[int, int]] = []
    for base, keep in ((0, lo < n_summaries), (n_summaries, lo >= n_summaries)):
        if not keep.any():
            continue
        order = np.argsort(lo[keep], kind="stable")
        start, reach = lo[keep][order], np.maximum.accumulate(hi[keep][order])
        cut = np.flatnonzero(start[1:] > reach[:-1] + _GAP)
        starts = start[np.append(0, cut + 1)]
        stops = reach[np.append(cut, len(reach) - 1)]
        aligned = (starts - base) // _ALIGN * _ALIGN + base
        ranges += zip(aligned.tolist(), stops.tolist(), strict=True)
    return ranges
