"""Which records each chunk of a sample retrieves: a pure function of the sample, the index and the guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data_pipeline.retrieval.encoder import PAD, Chunks
from data_pipeline.retrieval.guard import Guard, RetrievalCounts
from data_pipeline.retrieval.index import RetrievalIndex

#: Candidates searched for each record that may be used (k_max of spec section 13.3).
SEARCHED = 4

Ids = npt.NDArray[np.int32]


class Window(Protocol):
    """What is asked of a sample; ``data_pipeline.stream.Sample`` is one."""

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Ids [seq_len + 1]; the last is only a label."""

    @property
    def documents(self) -> npt.NDArray[np.int32]:
        """Number of each token's document in the dataset."""


class Neighbours:
    """Retrieves for chunks of ``index.chunk`` tokens, at the index's own present; counts what the guard did.

    A chunk asks with its own tokens and its ids are for the *next* chunk to read (``training.batches.stack`` moves them
    there), so no token is ever read through what was found with it or with a later one. The document that a chunk ends
    in is never searched: it holds the labels. Where a chunk holds the end of one document and the start of another, it
    asks with the tokens of the last; the mask lets nobody read that answer who may not read the whole chunk.
    """

    def __init__(self, index: RetrievalIndex, guard: Guard, fan_in: int) -> None:
        """``fan_in``: ids per chunk, at least 1. Raises ``DataError`` if the guard names a source the index lacks."""
        assert fan_in >= 1
        guard.check(index)
        self.index, self.guard, self.fan_in, self.chunk = index, guard, fan_in, index.chunk
        self._counts = RetrievalCounts.none()

    def of(self, samples: Sequence[Window]) -> Ids:
        """Ids int32 [samples, chunks - 1, fan_in] found with each chunk but the last, which no one comes after.

        Chunks are counted over the ``seq_len`` inputs of a sample; -1 stands for none, after the valid ids.
        """
        chunks = -(-(len(samples[0].tokens) - 1) // self.chunk)
        asked = (chunks - 1) * self.chunk
        tokens = np.stack([s.tokens[:asked] for s in samples]).reshape(-1, self.chunk)
        documents = np.stack([s.documents[:asked] for s in samples]).reshape(-1, self.chunk)
        return self.found_with(tokens, documents, documents[:, -1]).reshape(len(samples), chunks - 1, self.fan_in)

    def found_with(
        self,
        tokens: npt.NDArray[np.integer[Any]],
        documents: npt.NDArray[np.integer[Any]],
        own: npt.NDArray[np.integer[Any]] | None,
    ) -> Ids:
        """Ids int32 [n, fan_in] found with whole chunks.

        Args:
            tokens: [n, chunk].
            documents: [n, chunk], any numbers that tell the documents of one chunk apart.
            own: number in the index of each chunk's last document [n]; None for text that is not in the index.
        """
        if not len(tokens):
            return np.empty((0, self.fan_in), dtype=np.int32)
        queries = self.index.encoder.encode(_last_documents(tokens, documents))
        found = self.index.search(queries, SEARCHED * self.fan_in, own)
        kept, rejected = self.guard.apply(found, self.index, self.index.as_of)
        ids = np.full((len(queries), self.fan_in), -1, dtype=np.int32)
        for row, one, passes in zip(ids, found.ids, kept, strict=True):
            chosen = one[passes][: self.fan_in]
            row[: len(chosen)] = chosen
        self._counts += RetrievalCounts.of(rejected, ids, found)
        return ids

    def take_counts(self) -> RetrievalCounts:
        """Counts since the last call."""
        counts, self._counts = self._counts, RetrievalCounts.none()
        return counts


def _last_documents(tokens: npt.NDArray[np.integer[Any]], documents: npt.NDArray[np.integer[Any]]) -> Chunks:
    """The tokens of each chunk's last document, moved to the front and padded."""
    same = documents == documents[:, -1:]
    order = np.argsort(~same, axis=1, kind="stable")
    moved = np.take_along_axis(tokens.astype(np.int32), order, axis=1)
    return np.where(np.take_along_axis(same, order, axis=1), moved, np.int32(PAD))
