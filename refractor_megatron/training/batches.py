"""Which samples make which micro-batch: a pure function of (step, grid), so any grid sees the same global batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from data_pipeline.stream import Sample, SampleStream

from ..engines.base import Batch


def stack(samples: Sequence[Sample]) -> Batch:
    """Samples as one micro-batch."""
    tokens = torch.from_numpy(np.stack([s.tokens for s in samples])).long()  # [b, s + 1]
    records = torch.from_numpy(np.stack([s.records for s in samples])).int()  # [b, s + 1, 4]
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), records[:, :-1].contiguous())


def rank_batches(
    stream: SampleStream, first: int, micro_batch: int, micro_batches: int, data_rank: int, data_size: int
) -> Iterator[Batch]:
    """The micro-batches of one data-parallel rank, from the global batch that starts at sample ``first``.

    Micro-batch m of rank r is number m·size + r of the global batch: one rank alone sees the same ones in order.
    """
    for m in range(micro_batches):
        start = first + (m * data_size + data_rank) * micro_batch
        yield stack([stream.sample(i) for i in range(start, start + micro_batch)])
