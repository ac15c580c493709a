"""Deals the text of all domains out to the stages and packs it, from the longest stage to the shortest.

What a stage cannot make into full sequences of one domain goes down to the next shorter one, cut there if it must be;
so nothing is lost but, of each domain, less than one sequence of the shortest stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from data_pipeline.curriculum.routing import Pool, TooLittle, cut, sequences_of
from data_pipeline.pack.best_fit import Packing, fill_needed, pack, pack_with

Ints = npt.NDArray[np.int64]
#: Sequences without which a stage after the first is not made: of one alone there is nothing to shuffle or to mix.
FEWEST = 2


@dataclass(frozen=True)
class Corpus:
    """``starts`` int64 [documents + 1]: first token of each training document; ``domains`` int64 [documents]: its
    domain, or -1 for a document that is not trained on; ``count`` domains; ``made``: by the stage's length, the task
    documents int64 [n, 3] of each kind."""

    starts: Ints
    domains: Ints
    count: int
    made: dict[int, list[Ints]] = field(default_factory=dict)

    def domain_of(self, pieces: Ints) -> Ints:
        """Domain of each training piece, int64 [n]."""
        return self.domains[np.searchsorted(self.starts, pieces[:, 1], side="right") - 1]

    def pools(self, capacity: int, key: str) -> list[Pool]:
        """The training documents of each domain."""
        order = np.argsort(self.domains, kind="stable")
        borders = np.searchsorted(self.domains[order], np.arange(self.count + 1))
        length = np.diff(self.starts)
        order_of = (order[low:high] for low, high in zip(borders, borders[1:], strict=False))
        return [Pool(_training(self.starts[rows], length[rows]), capacity, key) for rows in order_of]


@dataclass(frozen=True)
class Dealt:
    """A stage: the ``packings`` of each domain and then of each kind of task; ``passed``: tokens that went down to the
    next stage or, from the first, to nobody; ``tasks_out``: task documents for which there was no filler."""

    length: int
    below: int  # tokens that the stage before this one holds whole, 0 for the first
    packings: list[Packing]
    passed: int
    tasks_out: int


@dataclass(frozen=True)
class LeftOut:
    """A stage of ``length`` that cannot be made honestly."""

    length: int
    reason: TooLittle


def deal(
    corpus: Corpus, lengths: Sequence[int], short_share: float, kinds: int, key: str
) -> tuple[list[Dealt], list[LeftOut]]:
    """Stages in the order of ``lengths``, and those that had too little text. A lone one has what there is, were it
    nothing. Where a stage is left out, all is dealt again without it: its documents are long for the one after it."""
    left_out: list[LeftOut] = []
    while True:
        stages = _attempt(corpus, lengths, short_share, kinds, key)
        if not isinstance(stages, LeftOut):
            return stages, left_out
        left_out.append(stages)
        lengths = [length for length in lengths if length != stages.length]


def _attempt(corpus: Corpus, lengths: Sequence[int], short_share: float, kinds: int, key: str) -> list[Dealt] | LeftOut:
    pools = corpus.pools(lengths[-1] + 1, f"{key} pool")
    stages = []
    for place in reversed(range(len(lengths))):
        below = lengths[place - 1] + 1 if place else 0
        tasks = corpus.made.get(lengths[place], [_nothing()] * kinds)
        stage = _stage(corpus, pools, lengths[place], below, tasks, short_share, f"{key} {lengths[place]}")
        if isinstance(stage, TooLittle):
            return LeftOut(lengths[place], stage)
        made = sum(len(one.starts) - 1 for one in stage.packings[: corpus.count])
        if not place and len(lengths) > 1 and made < FEWEST:  # as when all text is longer
            return LeftOut(lengths[0], TooLittle(made * (lengths[0] + 1), FEWEST * (lengths[0] + 1)))
        stages.append(stage)
    return stages[::-1]


def _stage(
    corpus: Corpus, pools: list[Pool], length: int, below: int, made: list[Ints], short_share: float, key: str
) -> Dealt | TooLittle:
    capacity = length + 1
    tasks, out = [], 0
    for number, whole in enumerate(made):
        packing, rest = _pack_tasks(corpus, pools, whole, capacity, below or capacity, f"{key} task {number}")
        tasks.append(packing)
        out += len(rest)
    counts: Ints | None = None
    if below:
        long = np.array([pool.tokens(below, capacity) for pool in pools], dtype=np.int64)
        short = np.array([pool.tokens(0, below) for pool in pools], dtype=np.int64)
        answer = sequences_of(long, short, capacity, short_share)
        if isinstance(answer, TooLittle):
            return answer
        if answer.sum() < FEWEST:
            return TooLittle(int(np.minimum(long, answer * capacity).sum()), FEWEST * capacity)
        counts = answer
    packings, passed = [], 0
    for domain, pool in enumerate(pools):
        pieces = pool.take(below, capacity)
        if counts is not None:
            missing = int(counts[domain]) * capacity - int(pieces[:, 2].sum())
            pieces = np.concatenate([pieces, pool.take(0, below, max(0, missing))])
        packings.append(pack(pieces, capacity, key))
        left = packings[-1].left
        passed += int(left[:, 2].sum())
        if below:
            pool.give(cut(left, below))
    return Dealt(length, below, packings + tasks, passed, out)


def _pack_tasks(
    corpus: Corpus, pools: list[Pool], whole: Ints, capacity: int, most: int, key: str
) -> tuple[Packing, Ints]:
    """Task documents stay whole: it is training text no longer than ``most`` that fills their sequences up."""
    need = fill_needed(whole, capacity)
    supply = np.array([pool.tokens(0, most) for pool in pools], dtype=np.int64)
    shares = np.minimum(supply, np.ceil(need * (supply / max(1, int(supply.sum())))).astype(np.int64))
    taken = [pool.take(0, most, int(share)) for pool, share in zip(pools, shares, strict=True)]
    fillers = Pool(np.concatenate([_nothing(), *taken]), most, f"{key} fill").pieces
    packing, rest = pack_with(whole, fillers, capacity, key)
    domains = corpus.domain_of(packing.left)
    for domain in np.unique(domains):
        pools[domain].give(packing.left[domains == domain])
    return packing, rest


def _training(first: Ints, length: Ints) -> Ints:
    return np.stack([np.zeros_like(first), first, length], axis=1)[length > 0]


def _nothing() -> Ints:
    return np.empty((0, 3), dtype=np.int64)
