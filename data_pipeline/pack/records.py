"""``.rec``: the token records of an indexed dataset, run-length encoded.

Layout, little endian: 8-byte magic, u32 version, u32 zero, u64 documents, u64 tokens, u64 spans; then int64
[documents + 1], first span of each document; then int32 [spans, 4] = (length, segment, role, mask_bits). The spans of a
document cover it exactly, so span boundaries in the token stream are the running sum of lengths.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from data_pipeline.pack.header import read_header
from refractor_megatron.errors import DataError

_MAGIC = b"RFRCREC\x00"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQQ")


class RecordWriter:
    """Writes the spans of documents to ``<prefix>.rec``.

    The number of documents, which stands first in the file, is known last, so spans wait in a nameless file beside it;
    eight bytes a document are held in memory. ``close`` writes the file; without it none appears.
    """

    def __init__(self, prefix: Path) -> None:
        self._path = prefix.with_suffix(".rec")
        self._first = array("q", [0])
        self._spans = tempfile.TemporaryFile(dir=prefix.parent)  # noqa: SIM115  # lives as long as this object
        self._tokens = 0

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.abandon()

    def add(self, spans: npt.NDArray[np.int32]) -> None:
        """Appends one document's spans, int32 [k, 4]."""
        self.add_many(spans, np.array([len(spans)], dtype=np.int64))

    def add_many(self, spans: npt.NDArray[np.int32], counts: npt.NDArray[np.int64]) -> None:
        """Appends documents whose spans, int32 [k, 4], lie back to back; ``counts`` int64 [documents] sum to k."""
        assert int(counts.sum()) == len(spans)
        self._spans.write(spans.astype("<i4").tobytes())
        self._first.frombytes((self._first[-1] + np.cumsum(counts, dtype=np.int64)).tobytes())
        self._tokens += int(spans[:, 0].sum(dtype=np.int64))

    def abandon(self) -> None:
        """Drops the spans; nothing after ``close``."""
        self._spans.close()

    def close(self) -> int:
        """Writes the file; returns the number of spans."""
        header = _HEADER.pack(_MAGIC, VERSION, 0, len(self._first) - 1, self._tokens, self._first[-1])
        with self._path.open("wb") as out, self._spans:
            out.write(header)
            out.write(self._first.tobytes())
            self._spans.seek(0)
            shutil.copyfileobj(self._spans, out, 1 << 20)
        return self._first[-1]


@dataclass(frozen=True)
class Records:
    """``spans``: int32 [spans, 4]; ``starts``: int64 [spans + 1], first token of each span and the total;
    ``first``: int64 [documents + 1], first span of each document and the total."""

    spans: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]


def read_records(prefix: Path) -> Records:
    """Opens ``<prefix>.rec`` by memory map. Raises ``DataError`` if it is missing, truncated or inconsistent."""
    path = prefix.with_suffix(".rec")
    (version, _, documents, tokens, count), size = read_header(path, _HEADER, _MAGIC, "record file")
    if version != VERSION:
        raise DataError(
            f"{path} has record format version {version}, this code reads {VERSION}; build the dataset again."
        )
    if size != _HEADER.size + 8 * (documents + 1) + 16 * count:
        raise DataError(f"{path} is truncated; build the dataset again.")
    first = np.memmap(path, dtype="<i8", mode="r", offset=_HEADER.size, shape=(documents + 1,))
    spans = np.memmap(path, dtype="<i4", mode="r", offset=_HEADER.size + 8 * (documents + 1), shape=(count, 4))
    starts = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(spans[:, 0], dtype=np.int64, out=starts[1:])
    if int(starts[-1]) != tokens or int(first[-1]) != count:
        raise DataError(f"{path} contradicts its own header; build the dataset again.")
    return Records(spans, starts, first)
