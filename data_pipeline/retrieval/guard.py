"""The retrieval guard (spec sections 7.1 and 13.3): which of the found records may be used, and why the others not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.retrieval.index import Candidates, RetrievalIndex
from refractor_megatron.errors import DataError

#: Why a record is not used; each is counted under the first reason that holds, in this order.
PREDICATES = ("own_document", "similarity", "age", "source", "trust")
#: Bins of the histogram of similarities: tenths from 0 to 1; what lies outside counts in the outermost.
BINS = 10


@dataclass(frozen=True)
class RetrievalCounts:
    """Sums over queries; they add up over steps and ranks.

    ``values`` int64 [17]: rejected records by ``PREDICATES``, records kept, queries, candidates by similarity bin.
    """

    values: npt.NDArray[np.int64]

    @classmethod
    def none(cls) -> RetrievalCounts:
        """Nothing counted yet."""
        return cls(np.zeros(len(PREDICATES) + 2 + BINS, dtype=np.int64))

    @classmethod
    def of(cls, rejected: npt.NDArray[np.int64], ids: npt.NDArray[np.int32], found: Candidates) -> RetrievalCounts:
        """Of one search: ``rejected`` by the guard, ``ids`` [Q, R] to be read (-1 for none), all that was ``found``."""
        similarity = np.nan_to_num(found.similarity[found.ids >= 0], nan=0.0)
        bins = np.clip((similarity * BINS).astype(np.int64), 0, BINS - 1)
        kept = [np.count_nonzero(ids >= 0), len(ids)]
        return cls(np.concatenate([rejected, kept, np.bincount(bins, minlength=BINS)]).astype(np.int64))

    def __add__(self, other: RetrievalCounts) -> RetrievalCounts:
        return RetrievalCounts(self.values + other.values)

    @property
    def rejected(self) -> dict[str, int]:
        """Records rejected, by reason."""
        return dict(zip(PREDICATES, self.values.tolist(), strict=False))

    @property
    def kept(self) -> int:
        """Records that a later chunk may read."""
        return int(self.values[len(PREDICATES)])

    @property
    def queries(self) -> int:
        """Chunks that retrieved."""
        return int(self.values[len(PREDICATES) + 1])

    def summary(self) -> dict[str, Any]:
        """For a report: rejected by reason, mean kept records of a chunk, candidates by similarity."""
        kept = self.kept / max(1, self.queries)
        return {"rejected": self.rejected, "kept_per_chunk": kept, "similarity": self.histogram}

    @property
    def histogram(self) -> list[int]:
        """Candidates by similarity, before the guard."""
        return [int(count) for count in self.values[-BINS:]]


@dataclass(frozen=True)
class Guard:
    """The predicates. ``sources``: names that may be retrieved from; None: all."""

    sigma_min: float  # smallest cosine similarity
    t_max_s: int  # greatest age, seconds
    trust_min: float  # smallest trust, 0..1
    sources: tuple[str, ...] | None = None

    def check(self, index: RetrievalIndex) -> None:
        """Raises ``DataError`` if a name in ``sources`` is none of the index's."""
        for name in self.sources or ():
            if name not in index.sources:
                known = ", ".join(index.sources[:8]) + (", ..." if len(index.sources) > 8 else "")
                raise DataError(f"relation.retrieval.sources: no record is from {name!r}; the sources are {known}.")

    def apply(
        self, found: Candidates, index: RetrievalIndex, now: int
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Which candidates pass at ``now`` (unix seconds), bool [Q, K], and how many fail by ``PREDICATES``, int64 [5].

        A similarity that is not a number is too small. A record older than its own ``ttl_s`` is too old.
        """
        present = found.ids >= 0
        records = index.records[np.where(present, found.ids, 0)]
        age = now - records["timestamp"]
        refused: list[npt.NDArray[np.bool_]] = [
            ~(found.similarity >= self.sigma_min),
            (age > self.t_max_s) | (age > records["ttl_s"]),
            ~self._allowed(index)[records["source"]],
            ~(records["trust"] >= self.trust_min),
        ]
        left = present
        rejected = [found.own.sum()]
        for one in refused:
            rejected.append(np.count_nonzero(left & one))
            left = left & ~one
        return left, np.array(rejected, dtype=np.int64)

    def _allowed(self, index: RetrievalIndex) -> npt.NDArray[np.bool_]:
        if self.sources is None:
            return np.ones(len(index.sources), dtype=np.bool_)
        return np.isin(np.array(index.sources), np.array(self.sources))
