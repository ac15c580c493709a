"""Which samples make which micro-batch: a pure function of (step, grid), so any grid sees the same global batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from data_pipeline.retrieval.neighbours import Ids, Neighbours
from data_pipeline.samples import Sample, Stream

from ..engines.base import Batch


def stack(samples: Sequence[Sample], neighbours: Neighbours | None = None) -> Batch:
    """Samples as one micro-batch; with ``neighbours``, each token's record names the records that it may read."""
    tokens = torch.from_numpy(np.stack([s.tokens for s in samples])).long()  # [b, s + 1]
    records = np.stack([s.records for s in samples])[:, :-1]  # [b, s, 4]
    if neighbours is not None:
        ids = read_by_next(neighbours.of(samples), neighbours.chunk, records.shape[1])
        records = np.concatenate([records, ids], axis=2)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.from_numpy(records).int().contiguous())


def read_by_next(found: Ids, chunk: int, length: int) -> Ids:
    """Ids int32 [b, length, R] that each token may read: those found with the chunk before its own (RETRO's shift).

    found: int32 [b, chunks - 1, R], found with each chunk but the last. The first chunk has nothing to read: -1.
    """
    nothing = np.full((len(found), 1, found.shape[2]), -1, dtype=np.int32)
    return np.repeat(np.concatenate([nothing, found], axis=1), chunk, axis=1)[:, :length]


def rank_batches(
    stream: Stream,
    first: int,
    micro_batch: int,
    micro_batches: int,
    data_rank: int,
    data_size: int,
    neighbours: Neighbours | None = None,
) -> Iterator[Batch]:
    """The micro-batches of one data-parallel rank, from the global batch that starts at sample ``first``.

    Micro-batch m of rank r is number m·size + r of the global batch: one rank alone sees the same ones in order.
    """
    for m in range(micro_batches):
        start = first + (m * data_size + data_rank) * micro_batch
        yield stack([stream.sample(i) for i in range(start, start + micro_batch)], neighbours)
