"""Samples of a packed stage: a pure function of (dataset content, seed, stage, global sample index).

The schedule of the mix says which domain sample i is from and how many of that domain came before; a keyed permutation
of the domain's sequences, another one each epoch of the domain, says which sequence that is. There is no iterator
state: a run that is resumed, or goes on with other ranks, asks for the same indices.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline import manifest as manifests
from data_pipeline.mix.schedule import Schedule
from data_pipeline.pack.indexed import Indexed, read_indexed
from data_pipeline.pack.packed import STORES, Packed, path_of, read_packed
from data_pipeline.pack.records import Records, read_records
from data_pipeline.permutation import permutation
from data_pipeline.samples import Sample, Stream, Stretch, token_records
from data_pipeline.stream import SampleStream
from refractor_megatron.errors import DataError
from refractor_megatron.tokenizer import Tokenizer

#: Key of the manifest under which ``curriculum.plan.plan_stages``' answer stands.
KEY = "curriculum"


def open_stage(folder: Path, seq_len: int, seed: int) -> Stream:
    """The training samples of ``seq_len`` tokens: the stage of that length, or windows where a dataset has no stages.

    Raises ``DataError`` for a dataset whose stages have other lengths.
    """
    lengths = stage_lengths(manifests.load(Path(folder)))
    return PackedStream(folder, seq_len, seed) if lengths else SampleStream(folder, seq_len, seed)


def stage_lengths(manifest: dict[str, object]) -> list[int]:
    """Lengths of the dataset's stages, rising; none where it is read in windows."""
    curriculum = manifest.get(KEY)
    return [stage["length"] for stage in curriculum["stages"]] if isinstance(curriculum, dict) else []


class PackedStream:
    """Samples of one stage of a dataset folder."""

    def __init__(self, folder: Path, seq_len: int, seed: int) -> None:
        """Opens memory maps; reads no token.

        Raises ``DataError`` if there is no such stage, or files are missing, damaged or of different builds.
        """
        self.folder, self.seq_len, self.seed = Path(folder), seq_len, seed
        self.manifest = manifests.load(self.folder)
        lengths = stage_lengths(self.manifest)
        if seq_len not in lengths:
            known = ", ".join(map(str, lengths)) or "none"
            raise DataError(
                f"{self.folder} has no stage of train.seq_len {seq_len}; set train.seq_len to one of its stages "
                f"({known}), or build with it among data.curriculum.lengths."
            )
        self._packed: Packed = read_packed(path_of(self.folder, seq_len))
        stores = STORES[: len(self._packed.stores)]
        self._data: list[Indexed] = [read_indexed(self.folder / store) for store in stores]
        self._records: list[Records] = [read_records(self.folder / store) for store in stores]
        self._check()
        self._schedule = Schedule(self._packed.slots)
        self._first = np.concatenate([[0], np.cumsum(self._packed.sequences)])
        self.samples_per_epoch = len(self._packed)
        self.tokens_total = len(self._packed) * (seq_len + 1)

    def _check(self) -> None:
        sizes = [int(data.starts[-1]) for data in self._data]
        covered = [int(records.starts[-1]) for records in self._records]
        documents = [len(data.starts) for data in self._data]
        agree = (
            self._packed.capacity == self.seq_len + 1
            and sizes == covered == self._packed.stores.tolist()
            and documents == [len(records.first) for records in self._records]
        )
        if not agree:
            raise DataError(
                f"{path_of(self.folder, self.seq_len)} and the .bin, .idx and .rec files beside it are not of one "
                f"build; delete {self.folder} and build it again."
            )

    @property
    def digest(self) -> str:
        """sha256 over all files of the dataset."""
        return str(self.manifest["content_sha256"])

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text per token of the whole training split, special tokens included in the count."""
        counts = self.manifest["splits"]["train"]
        return float(counts["bytes"] / counts["tokens"])

    @functools.cached_property
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Bytes of each token, int32 [tokenizer vocabulary]; special tokens have 0."""
        return Tokenizer.load(self.folder / "tokenizer.json").token_bytes

    @property
    def packed(self) -> Packed:
        """What the stage is made of."""
        return self._packed

    def position(self, index: int) -> float:
        """Passes completed before sample ``index``; a pass is as many samples as the stage has sequences."""
        return index / self.samples_per_epoch

    def sequence(self, index: int) -> int:
        """Number of the sequence that is sample ``index`` >= 0, in the order of the file."""
        domain, before = self._schedule(index)
        count = int(self._packed.sequences[domain])
        epoch, place = divmod(before, count)
        key = f"{self.digest} train {self.seed} {self.seq_len} {domain} {epoch}".encode()
        return int(self._first[domain]) + permutation(count, key)(place)

    def sample(self, index: int) -> Sample:
        """The sample of global index ``index`` >= 0."""
        return self.window(self.sequence(index))

    def in_order(self) -> Iterator[Sample]:
        """All sequences, each once, domain after domain."""
        return map(self.window, range(self.samples_per_epoch))

    def window(self, number: int) -> Sample:
        """Sequence ``number`` of 0..samples_per_epoch-1 in the order of the file."""
        if not 0 <= number < self.samples_per_epoch:
            raise IndexError(f"sequence {number} of {self.samples_per_epoch}")
        pieces = [(store, low, low + length) for store, low, length in self._packed.of(number).tolist()]
        tokens = np.concatenate([self._data[store].tokens[low:high] for store, low, high in pieces])
        splits = self.manifest["splits"]
        before = (0, splits["train"]["documents"] + splits["heldout"]["documents"])
        stretches = [Stretch(self._records[store], low, high, before[store]) for store, low, high in pieces]
        return Sample(tokens.astype(np.int64), *token_records(stretches))

    def consumed(self, index: int) -> dict[str, int]:
        """Samples of each domain before sample ``index``."""
        names = self.manifest[KEY]["domains"]
        counts = self._schedule.before(index)
        return {name: int(count) for name, count in zip(names, counts, strict=True) if count}
