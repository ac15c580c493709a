"""Tier C of a run: the bank that the model reads, what chooses records for its batches, and the counts of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..fabric.retrieval import RetrievalBank
from .dataset import neighbours_of, open_index

if TYPE_CHECKING:
    from data_pipeline.retrieval.guard import RetrievalCounts
    from data_pipeline.retrieval.index import RetrievalIndex
    from data_pipeline.retrieval.neighbours import Neighbours

    from ..config import RunConfig
    from ..engines.base import Engine
    from ..telemetry.registry import MetricValue
    from .folder import RunFolder


@dataclass(frozen=True, eq=False)
class Retrieval:
    """All parts are None where the configuration retrieves nothing."""

    cfg: RunConfig
    index: RetrievalIndex | None
    bank: RetrievalBank | None

    @property
    def digest(self) -> str | None:
        """Digest of the index."""
        return None if self.index is None else self.index.digest

    def neighbours(self) -> Neighbours | None:
        """A chooser with counts of its own."""
        return None if self.index is None else neighbours_of(self.cfg, self.index)


def open_retrieval(folder: RunFolder, cfg: RunConfig, device: torch.device) -> Retrieval:
    """What the launcher has prepared; the bank goes to ``device``."""
    index = open_index(folder, cfg)
    return Retrieval(cfg, index, None if index is None else RetrievalBank.from_index(index, device))


def global_counts(neighbours: Neighbours | None, engine: Engine) -> RetrievalCounts | None:
    """Counts since the last call over the batches of all data-parallel ranks, known to every rank."""
    if neighbours is None:
        return None
    from data_pipeline.retrieval.guard import RetrievalCounts

    total = torch.from_numpy(neighbours.take_counts().values).to(engine.device)
    dist.all_reduce(total)
    # ranks of one data-parallel place prepare the same batches
    return RetrievalCounts(total.cpu().numpy() // (dist.get_world_size() // engine.data_size))


def retrieval_metrics(counts: RetrievalCounts) -> dict[str, MetricValue]:
    """Registered metrics of some chunks."""
    return {
        "retrieval_rejected": [float(count) for count in counts.rejected.values()],
        "retrieval_kept": counts.kept / max(1, counts.queries),
    }
