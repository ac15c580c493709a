"""``.rec``: the token records of an indexed dataset, run-length encoded.

Layout, little endian: 8-byte magic, u32 version, u32 zero, u64 documents, u64 tokens, u64 spans; then int64
[documents + 1], first span of each document; then int32 [spans, 4] = (length, segment, role, mask_bits). The spans of a
document cover it exactly, so span boundaries in the token stream are the running sum of lengths.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from refractor_megatron.errors import DataError

_MAGIC = b"RFRCREC\x00"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQQ")


class RecordWriter:
    """Collects the spans of documents and writes ``<prefix>.rec`` on ``close``."""

    def __init__(self, prefix: Path) -> None:
        self._path = prefix.with_suffix(".rec")
        self._first = array("q", [0])
        self._spans = bytearray()
        self._tokens = 0

    def add(self, spans: npt.NDArray[np.int32]) -> None:
        """Appends one document's spans, int32 [k, 4]."""
        self._spans += spans.astype("<i4").tobytes()
        self._first.append(self._first[-1] + len(spans))
        self._tokens += int(spans[:, 0].sum())

    def close(self) -> None:
        """Writes the file."""
        header = _HEADER.pack(_MAGIC, VERSION, 0, len(self._first) - 1, self._tokens, self._first[-1])
        with self._path.open("wb") as out:
            out.write(header)
            out.write(self._first.tobytes())
            out.write(self._spans)


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
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEADER.size)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"Cannot read {path} ({error.strerror}); build the dataset again.") from error
    if len(head) < _HEADER.size or head[:8] != _MAGIC:
        raise DataError(f"{path} is not a record file; build the dataset again.")
    _, version, _, documents, tokens, count = _HEADER.unpack(head)
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
