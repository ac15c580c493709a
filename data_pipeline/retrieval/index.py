"""The retrieval index: vectors and metadata of the training text's chunks, and exact search among them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline import manifest as manifests
from data_pipeline.retrieval.encoder import HashingEncoder
from refractor_megatron.errors import DataError

INDEX = manifests.Kind(
    "retrieval index",
    "start the run again, which builds it",
    "refractor-retrieval",
    2,
    ("vectors.npy", "records.npy", "idf.npy"),
)
#: A record: its tokens are ``start .. start + length`` of the training split, ``document`` is the number there,
#: ``source`` a place in the names of the index, ``timestamp`` unix seconds, ``policy`` bits of ``RecordPolicy``.
RECORD = np.dtype(
    [
        ("start", "<i8"),
        ("length", "<i4"),
        ("document", "<i4"),
        ("source", "<i4"),
        ("timestamp", "<i8"),
        ("trust", "<f4"),
        ("policy", "u1"),
        ("ttl_s", "<i4"),
    ]
)
#: Records and queries multiplied at a time; bounds memory.
_RECORDS, _QUERIES = 1 << 14, 1 << 8
#: Below this many queries, BLAS takes half the time for the transposed product (measured with 3 to 12).
_FEW = 16


@dataclass(frozen=True)
class Candidates:
    """What a search found for Q queries, best first, ties by id.

    ``similarity`` float32 [Q, K]; ``ids`` int32 [Q, K], -1 where there are fewer than K; ``own`` int64 [Q]: how many
    records of the query's own document, which are left out, are at least as similar as the last candidate.
    """

    similarity: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int32]
    own: npt.NDArray[np.int64]


@dataclass(frozen=True)
class RetrievalIndex:
    """``vectors`` float32 [N, dim] and ``records`` [N] of ``RECORD``, in order of document and start.

    ``as_of``: unix seconds, the present from which ages count. ``digest``: sha256 of the manifest, and so of all files.
    """

    vectors: npt.NDArray[np.float32]
    records: npt.NDArray[Any]
    encoder: HashingEncoder
    chunk: int
    sources: tuple[str, ...]
    as_of: int
    digest: str

    @classmethod
    def load(cls, folder: Path) -> RetrievalIndex:
        """Opens memory maps; reads no vector. Raises ``DataError`` if a file is missing, truncated or no array."""
        manifest = manifests.load(folder, INDEX)
        arrays = {}
        for name in INDEX.files:
            try:
                arrays[name] = np.load(folder / name, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{folder / name} is damaged ({error}); delete {folder} and build it again.") from error
        return cls(
            arrays["vectors.npy"],
            arrays["records.npy"],
            HashingEncoder(manifest["dim"], np.array(arrays["idf.npy"])),
            manifest["chunk"],
            tuple(manifest["sources"]),
            manifest["as_of"],
            hashlib.sha256(manifests.canonical(manifest)).hexdigest(),
        )

    @cached_property
    def documents(self) -> npt.NDArray[np.int32]:
        """Document of each record, int32 [N], ascending."""
        return np.ascontiguousarray(self.records["document"])

    @property
    def policies(self) -> npt.NDArray[np.uint8]:
        """``RecordPolicy`` bits of each record, uint8 [N]."""
        return np.ascontiguousarray(self.records["policy"])

    def search(
        self, queries: npt.NDArray[np.float32], k: int, own: npt.NDArray[np.integer[Any]] | None = None
    ) -> Candidates:
        """The ``k`` records of other documents most similar to each query.

        Args:
            queries: vectors of the encoder, float32 [Q, dim].
            own: document of each query [Q]; None or a number outside the index leaves no record out. They are left out
                before the choice: a long document would fill it with itself.
        """
        assert k >= 1 and queries.shape[1] == self.vectors.shape[1]
        ranges = np.zeros((len(queries), 2), dtype=np.int64)
        if own is not None:
            ranges[:, 0] = np.searchsorted(self.documents, own, side="left")
            ranges[:, 1] = np.searchsorted(self.documents, own, side="right")
        best = [
            one
            for low in range(0, len(queries), _QUERIES)
            for one in self._best(queries[low : low + _QUERIES], ranges[low : low + _QUERIES], k)
        ]
        left_out = [
            np.count_nonzero(self.vectors[first:last] @ query >= one.similarity[-1])
            for query, (first, last), one in zip(queries, ranges, best, strict=True)
        ]
        return Candidates(
            np.stack([one.similarity for one in best]),
            np.stack([one.ids for one in best]),
            np.array(left_out, dtype=np.int64),
        )

    def _best(self, queries: npt.NDArray[np.float32], left_out: npt.NDArray[np.int64], k: int) -> list[_Best]:
        best = [_Best(k) for _ in queries]
        for low in range(0, len(self.vectors), _RECORDS):
            vectors = self.vectors[low : low + _RECORDS]
            # exact, whichever way it is multiplied: see the encoder
            few = len(queries) < _FEW
            similarity = np.ascontiguousarray((vectors @ queries.T).T) if few else queries @ vectors.T
            for row, (first, last), one in zip(similarity, left_out, best, strict=True):
                row[max(first - low, 0) : max(last - low, 0)] = -np.inf
                one.add(row, low)
        return best


class _Best:
    """The k best of what was added so far, by similarity and then by id."""

    def __init__(self, k: int) -> None:
        self.similarity = np.full(k, -np.inf, dtype=np.float32)
        self.ids = np.full(k, -1, dtype=np.int32)

    def add(self, similarity: npt.NDArray[np.float32], first: int) -> None:
        """Adds records ``first, first + 1, ..``; those at -inf are left out."""
        k = len(self.ids)
        floor = self.similarity[-1]
        if len(similarity) > k:
            floor = max(floor, np.partition(similarity, -k)[-k])
        place = np.flatnonzero((similarity >= floor) & (similarity > -np.inf))
        all_similarity = np.concatenate([self.similarity, similarity[place]])
        all_ids = np.concatenate([self.ids, (place + first).astype(np.int32)])
        order = np.argsort(-all_similarity, kind="stable")[:k]  # stable: older, that is lower, ids first
        self.similarity, self.ids = all_similarity[order], all_ids[order]
