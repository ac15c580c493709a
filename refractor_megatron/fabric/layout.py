"""Which keys each block of queries visits: the block-sparse lowering of the interval form.

Keys of a sample live in one joint space [far | tokens]. Query blocks form binary trees. A node of a tree visits,
without any mask, the keys that all its rows may read and that no node above it has taken (summaries far back, the old
part of a dense prefix); a leaf visits what is left of its rows' intervals under a mask (the window, the newest
summaries, retrieved records). So most keys are read in tall calls, and masks stay small. Masks of equal content are one
object: in a plain document all leaves of a kind share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from refractor_megatron.distinction.intervals import IntArray
from refractor_megatron.distinction.rules import BoolTable
from refractor_megatron.fabric.joint import SampleKeys
from refractor_megatron.fabric.tree import Range, Shape, cores, leaves, pieces_of, split, without

#: One call serves all samples of a batch while this holds: visited(union) <= _UNION * visited(separately) ...
_UNION = 1.5
#: ... or while the calls are so small that their number costs more than their pairs.
_SMALL = 1 << 16
#: Rows under the root of a tree; the fused kernels reach their full speed at 768 rows.
_TALL = 1024
#: Biases are kept on the layout up to this many elements (32 MiB in float32) and rebuilt on each use beyond.
_CACHED_BIAS = 8 << 20


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """Legal edges of a partly masked visit.

    tables: samples with a mask of their own, 1 when all samples of the visit share it; pieces: int32 [n, 4] =
    (table, row, first column, last column), disjoint within a row.
    """

    tables: int
    rows: int
    keys: int
    pieces: npt.NDArray[np.int32]

    def legal(self) -> BoolTable:
        """bool [tables, rows, keys]."""
        table, row, lo, hi = self.pieces.T
        steps = np.zeros((self.tables, self.rows, self.keys + 1), dtype=np.int8)
        # Two statements: a piece may end in the column where the next one of its row begins.
        steps[table, row, lo] += 1
        steps[table, row, hi] -= 1
        return np.cumsum(steps[..., :-1], axis=-1, dtype=np.int8).view(np.bool_)

    @cached_property
    def idle(self) -> torch.Tensor | None:
        """bool [tables, 1, rows]: rows without a key in this visit; None when there are none."""
        idle = np.ones((self.tables, 1, self.rows), dtype=np.bool_)
        idle[self.pieces[:, 0], 0, self.pieces[:, 1]] = False
        return torch.from_numpy(idle) if idle.any() else None


@dataclass(frozen=True, eq=False, repr=False)
class Visit:
    """One op call: queries [first, last) of the samples [lo, hi) of the batch, over the given key ranges.

    far, tokens: ranges [lo, hi) in their own index spaces. mask: None when every edge is legal. opens: this is the
    first visit of its rows.
    """

    first: int
    last: int
    samples: Range
    far: tuple[Range, ...]
    tokens: tuple[Range, ...]
    mask: Mask | None
    opens: bool

    @property
    def keys(self) -> int:
        """Number of keys visited by every query of the block."""
        return sum(hi - lo for lo, hi in (*self.far, *self.tokens))

    @property
    def pairs(self) -> int:
        """(query, key) pairs computed, over all samples served."""
        return (self.last - self.first) * self.keys * (self.samples[1] - self.samples[0])


@dataclass(eq=False, repr=False)
class Layout:
    """All visits of a batch: ``rows`` queries over ``n_far`` far keys, then ``n_tokens`` token keys.

    every_row_visited: each row of each sample has a visit that opens it, so results need no zeros beforehand.
    """

    batch: int
    rows: int
    n_far: int
    n_tokens: int
    q_block: int
    visits: tuple[Visit, ...]
    every_row_visited: bool
    _bias: dict[tuple[Mask, torch.dtype, int], torch.Tensor] = field(default_factory=dict)

    @property
    def visited_pairs(self) -> int:
        """(query, key) pairs that the visits compute, masked ones included."""
        return _pairs(self.visits)

    def legal(self, index: int) -> BoolTable:
        """bool [1 or samples served, rows, keys] of one visit, in the order far, tokens; 1 when they share the mask."""
        visit = self.visits[index]
        if visit.mask is None:
            return np.ones((1, visit.last - visit.first, visit.keys), dtype=np.bool_)
        return visit.mask.legal()

    def edges(self, sample: int, rows: IntArray) -> BoolTable:
        """bool [len(rows), n_far + n_tokens]: the joint keys that the visits let each row of a sample read."""
        out = np.zeros((len(rows), self.n_far + self.n_tokens), dtype=np.bool_)
        for index, visit in enumerate(self.visits):
            inside = np.flatnonzero((rows >= visit.first) & (rows < visit.last))
            if not len(inside) or not visit.samples[0] <= sample < visit.samples[1]:
                continue
            legal = self.legal(index)
            table = 0 if len(legal) == 1 else sample - visit.samples[0]
            ranges = [*visit.far, *((lo + self.n_far, hi + self.n_far) for lo, hi in visit.tokens)]
            columns = np.concatenate([np.arange(lo, hi) for lo, hi in ranges])
            out[np.ix_(inside, columns)] |= legal[table][rows[inside] - visit.first]
        return out

    def bias(self, mask: Mask, dtype: torch.dtype, group: int) -> torch.Tensor:
        """Additive mask [tables, 1, group * rows, keys] of 0 and -inf on the CPU.

        Rows repeat ``group`` times, as the queries that share a key head are folded into rows.
        """
        key = (mask, dtype, group)
        if key in self._bias:
            return self._bias[key]
        legal = torch.from_numpy(mask.legal())
        bias = torch.zeros(legal.shape, dtype=dtype).masked_fill_(~legal, float("-inf")).repeat(1, group, 1)[:, None]
        if sum(kept.numel() for kept in self._bias.values()) + bias.numel() <= _CACHED_BIAS:
            self._bias[key] = bias
        return bias


def build_layout(samples: Sequence[SampleKeys], rows: int, n_far: int, n_tokens: int, q_block: int) -> Layout:
    """Lays out a batch: intervals of ``rows`` queries each, in the joint space of ``n_far + n_tokens`` keys.

    Samples that are the same object share their visits. Others share those of a tree where this visits few needless
    pairs, and have visits of their own elsewhere.
    """
    shape, batch, masks = Shape(rows, n_far, n_far + n_tokens, q_block), len(samples), _Masks()
    shared = all(sample is samples[0] for sample in samples)
    trees = _trees(samples[:1] if shared else samples, (0, batch), shape, masks)
    if not shared and not all(map(_is_small, trees)):
        apart = zip(*(_trees([sample], (i, i + 1), shape, masks) for i, sample in enumerate(samples)), strict=True)
        single = [[visit for visits in tree for visit in visits] for tree in apart]
        trees = [
            tree if _is_small(tree) or _pairs(tree) <= _UNION * _pairs(own) else own
            for tree, own in zip(trees, single, strict=True)
        ]
    visits = tuple(visit for tree in trees for visit in tree)
    opened = sum((v.last - v.first) * (v.samples[1] - v.samples[0]) for v in visits if v.opens)
    return Layout(
        batch=batch,
        rows=rows,
        n_far=n_far,
        n_tokens=n_tokens,
        q_block=q_block,
        visits=visits,
        every_row_visited=opened == rows * batch,
    )


def _pairs(visits: Sequence[Visit]) -> int:
    return sum(visit.pairs for visit in visits)


def _is_small(visits: Sequence[Visit]) -> bool:
    return _pairs(visits) <= _SMALL * len(visits)


class _Masks:
    """Makes masks, one object for equal contents."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int, int, bytes], Mask] = {}

    def of(self, tables: int, rows: int, keys: int, pieces: npt.NDArray[np.int32]) -> Mask:
        key = (tables, rows, keys, pieces.tobytes())
        if key not in self.found:
            self.found[key] = Mask(tables, rows, keys, pieces.copy())
        return self.found[key]


def _trees(samples: Sequence[SampleKeys], served: Range, shape: Shape, masks: _Masks) -> list[list[Visit]]:
    """Visits of each tree, those of its leaves first; ``served`` are the samples that every visit is for."""
    halves = pieces_of(samples, shape)
    common = cores(halves, shape, len(samples))
    span = 1
    while span * shape.q_block < _TALL:
        span *= 2
    visits: list[list[Visit]] = []
    inner: list[list[Visit]] = []
    taken: list[list[Range]] = []
    for first in range(0, shape.blocks, span):
        nodes, above = split(common[first : first + span])
        inner.append([_visit(shape, first + a, first + b, served, ranges, None, False) for a, b, ranges in nodes])
        visits.append([])
        taken += above
    for block, ranges, left in leaves([without(half, taken, shape) for half in halves], shape):
        first, last = shape.rows_of(block, block + 1)
        keys = sum(hi - lo for lo, hi in ranges)
        full = int((left[:, 3] - left[:, 2]).sum()) == len(samples) * (last - first) * keys
        mask = None if full else masks.of(len(samples), last - first, keys, left)
        visits[block // span].append(_visit(shape, block, block + 1, served, ranges, mask, True))
    return [low + high for low, high in zip(visits, inner, strict=True)]


def _visit(
    shape: Shape,
    block: int,
    end: int,
    served: Range,
    ranges: Sequence[Range],
    mask: Mask | None,
    opens: bool,
) -> Visit:
    first, last = shape.rows_of(block, end)
    far = tuple((lo, hi) for lo, hi in ranges if lo < shape.n_far)
    tokens = tuple((lo - shape.n_far, hi - shape.n_far) for lo, hi in ranges if lo >= shape.n_far)
    return Visit(first, last, served, far, tokens, mask, opens)
