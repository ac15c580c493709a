"""Training samples: a pure function of (dataset content, seed, stage, global sample index).

A sample is a window of ``seq_len + 1`` consecutive tokens over the concatenated documents, with stride ``seq_len`` so
that every token but the first is predicted exactly once an epoch. Each epoch visits every window once, in the order of
its own keyed permutation. There is no iterator state: a resumed or resharded run asks for the same indices.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline import manifest as manifests
from data_pipeline.pack.indexed import Indexed, read_indexed
from data_pipeline.pack.records import Records, read_records
from data_pipeline.permutation import Permutation
from refractor_megatron.errors import DataError
from refractor_megatron.tokenizer import Tokenizer

#: Curriculum stage; there is one so far, and it is part of the key so that stages will not share orders.
STAGE = 0


@dataclass(frozen=True)
class Sample:
    """``tokens`` int64 [seq_len + 1]; ``records`` int32 [seq_len + 1, 4] = (document, segment, role, mask_bits).

    Document and segment are numbered from 0 within the sample; a new document also begins a new segment.
    ``documents`` int32 [seq_len + 1] numbers the documents of the whole dataset: training first, then held-out.
    """

    tokens: npt.NDArray[np.int64]
    records: npt.NDArray[np.int32]
    documents: npt.NDArray[np.int32]


class SampleStream:
    """Samples of one split of a dataset folder."""

    def __init__(self, folder: Path, seq_len: int, seed: int, split: str = "train") -> None:
        """Opens memory maps; reads no token.

        Raises ``DataError`` if files are missing, truncated or of different builds, or if the split is shorter than
        one sample.
        """
        assert split in manifests.SPLITS and seq_len >= 1
        self.folder, self.seq_len, self.seed, self.split = Path(folder), seq_len, seed, split
        self.manifest = manifests.load(self.folder)
        self._data: Indexed = read_indexed(self.folder / split)
        self._records: Records = read_records(self.folder / split)
        self._check()
        self.tokens_total = int(self._data.starts[-1])
        self.samples_per_epoch = (self.tokens_total - 1) // seq_len
        if self.samples_per_epoch < 1:
            raise DataError(
                f"The {split} split of {self.folder} has {self.tokens_total} tokens, fewer than one sample of "
                f"train.seq_len + 1 = {seq_len + 1}; lower train.seq_len or build from more text."
            )

    def _check(self) -> None:
        counts = self.manifest["splits"][self.split]
        documents, tokens = len(self._data.starts) - 1, int(self._data.starts[-1])
        agree = (
            (counts["documents"], counts["tokens"]) == (documents, tokens)
            and len(self._records.first) - 1 == documents
            and int(self._records.starts[-1]) == tokens
        )
        if not agree:
            raise DataError(
                f"The .bin, .idx and .rec files of {self.folder / self.split} are not of one build; "
                f"delete {self.folder} and build it again."
            )

    @property
    def digest(self) -> str:
        """sha256 over all files of the dataset."""
        return str(self.manifest["content_sha256"])

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text per token of this split, special tokens included in the count."""
        counts = self.manifest["splits"][self.split]
        return float(counts["bytes"] / counts["tokens"])

    @functools.cached_property
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Bytes of each token, int32 [tokenizer vocabulary]; special tokens have 0."""
        return Tokenizer.load(self.folder / "tokenizer.json").token_bytes

    def position(self, index: int) -> float:
        """Epochs completed before sample ``index``."""
        return index / self.samples_per_epoch

    def sample(self, index: int) -> Sample:
        """The sample of global index ``index`` >= 0, in the permuted order of its epoch."""
        epoch, place = divmod(index, self.samples_per_epoch)
        return self.window(_permutation(self.samples_per_epoch, self._key(epoch))(place))

    def _key(self, epoch: int) -> bytes:
        return f"{self.digest} {self.split} {self.seed} {STAGE} {epoch}".encode()

    def in_order(self) -> Iterator[Sample]:
        """All windows from first to last: evaluation reads every predicted token once."""
        return map(self.window, range(self.samples_per_epoch))

    def window(self, number: int) -> Sample:
        """Window ``number`` of 0..samples_per_epoch-1 in text order."""
        if not 0 <= number < self.samples_per_epoch:
            raise IndexError(f"window {number} of {self.samples_per_epoch}")
        return self.at(number * self.seq_len)

    @property
    def document_starts(self) -> npt.NDArray[np.int64]:
        """First token of each document of the split, and behind the last one the number of tokens."""
        return np.asarray(self._data.starts)

    def at(self, low: int) -> Sample:
        """The sample of tokens ``low`` to ``low + seq_len`` of the split."""
        high = low + self.seq_len + 1
        if not 0 <= low < high <= self.tokens_total:
            raise IndexError(f"tokens {low} to {high} of {self.tokens_total}")
        return Sample(self._data.tokens[low:high].astype(np.int64), *self._records_of(low, high))

    def _records_of(self, low: int, high: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Records int32 [high - low, 4] and documents int32 [high - low] of the tokens ``low..high-1``."""
        spans = _overlapping(self._records.starts, low, high)
        columns = np.asarray(self._records.spans[spans.start : spans.stop, 1:])
        document = np.searchsorted(self._records.first, np.arange(spans.start, spans.stop), side="right")
        fresh = (np.diff(document) != 0) | (np.diff(columns[:, 0]) != 0)
        rows = np.empty((len(columns), 4), dtype=np.int32)
        rows[:, 0] = np.cumsum(np.diff(document, prepend=document[0]) != 0)
        rows[:, 1] = np.concatenate(([0], np.cumsum(fresh)))
        rows[:, 2:] = columns[:, 1:]
        lengths = _lengths(self._records.starts, spans, low, high)
        before = 0 if self.split == "train" else self.manifest["splits"]["train"]["documents"]
        return np.repeat(rows, lengths, axis=0), np.repeat((document - 1 + before).astype(np.int32), lengths)


@functools.lru_cache(maxsize=64)
def _permutation(n: int, key: bytes) -> Permutation:
    return Permutation(n, key)


def _overlapping(starts: npt.NDArray[np.int64], low: int, high: int) -> range:
    """Numbers of the intervals [starts[i], starts[i + 1]) that meet [low, high)."""
    first = int(np.searchsorted(starts, low, side="right")) - 1
    return range(first, int(np.searchsorted(starts, high, side="left")))


def _lengths(starts: npt.NDArray[np.int64], spans: range, low: int, high: int) -> npt.NDArray[np.int64]:
    edges = np.clip(starts[spans.start : spans.stop + 1], low, high)
    return np.diff(edges)
