"""Samples of a dataset without stages: a pure function of (dataset content, seed, stage, global sample index).

A sample is a window of ``seq_len + 1`` consecutive tokens over the concatenated documents, with stride ``seq_len`` so
that every token but the first is predicted exactly once an epoch. Each epoch visits every window once, in the order of
its own keyed permutation. There is no iterator state: a resumed or resharded run asks for the same indices.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline import manifest as manifests
from data_pipeline.pack.indexed import Indexed, read_indexed
from data_pipeline.pack.records import Records, read_records
from data_pipeline.permutation import permutation
from data_pipeline.samples import Sample, Stretch, token_records
from refractor_megatron.errors import DataError
from refractor_megatron.tokenizer import Tokenizer

__all__ = ["Sample", "SampleStream"]

#: Part of the key, so that no stage of ``packed_stream``, whose number is its length, has the order of the windows.
STAGE = 0


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
        return self.window(permutation(self.samples_per_epoch, self._key(epoch))(place))

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
        before = 0 if self.split == "train" else self.manifest["splits"]["train"]["documents"]
        return token_records([Stretch(self._records, low, high, before)])
