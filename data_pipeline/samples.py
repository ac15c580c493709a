"""What training reads: a sample, and what is asked of a stream of them, however the text was laid out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data_pipeline.pack.records import Records


@dataclass(frozen=True)
class Sample:
    """``tokens`` int64 [seq_len + 1]; ``records`` int32 [seq_len + 1, 4] = (document, segment, role, mask_bits).

    Document and segment are numbered from 0 within the sample; a new document also begins a new segment.
    ``documents`` int32 [seq_len + 1] numbers the documents of the whole dataset: training first, then held-out, then
    made tasks.
    """

    tokens: npt.NDArray[np.int64]
    records: npt.NDArray[np.int32]
    documents: npt.NDArray[np.int32]


class Stream(Protocol):
    """Samples as a pure function of (dataset content, seed, sequence length, index)."""

    seq_len: int
    tokens_total: int
    samples_per_epoch: int

    @property
    def digest(self) -> str:
        """sha256 over all files of the dataset."""

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text per token of the split."""

    @property
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Bytes of each token, int32 [tokenizer vocabulary]."""

    def position(self, index: int) -> float:
        """Epochs completed before sample ``index``."""

    def sample(self, index: int) -> Sample:
        """The sample of global index ``index`` >= 0."""

    def in_order(self) -> Iterator[Sample]:
        """All samples of the text once, unshuffled."""


@dataclass(frozen=True)
class Stretch:
    """Tokens ``low``..``high - 1`` of a split with ``records``, whose documents are numbered from ``before``."""

    records: Records
    low: int
    high: int
    before: int = 0


def token_records(stretches: Sequence[Stretch]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Records int32 [n, 4] and documents int32 [n] of stretches laid end to end; each begins a new document."""
    runs = [_runs(stretch) for stretch in stretches]
    lengths, document, columns = (np.concatenate(part) for part in zip(*runs, strict=True))
    stretch = np.repeat(np.arange(len(runs)), [len(run[0]) for run in runs])
    begun = (np.diff(document) != 0) | (np.diff(stretch) != 0)
    rows = np.zeros((len(lengths), 4), dtype=np.int32)
    rows[1:, 0] = np.cumsum(begun)
    rows[1:, 1] = np.cumsum(begun | (np.diff(columns[:, 0]) != 0))
    rows[:, 2:] = columns[:, 1:]
    return np.repeat(rows, lengths, axis=0), np.repeat(document.astype(np.int32), lengths)


def _runs(one: Stretch) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Runs of equal records within a stretch: tokens [r], document of the dataset [r], (segment, role, bits) [r, 3]."""
    starts = one.records.starts
    first = int(np.searchsorted(starts, one.low, side="right")) - 1
    last = int(np.searchsorted(starts, one.high, side="left"))
    edges = np.clip(starts[first : last + 1], one.low, one.high)
    document: npt.NDArray[np.int64] = np.searchsorted(one.records.first, np.arange(first, last), side="right")
    return edges[1:] - edges[:-1], document - 1 + one.before, np.asarray(one.records.spans[first:last, 1:])
