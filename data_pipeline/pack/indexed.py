"""Megatron's indexed dataset, written and read with numpy alone.

``.bin`` holds the token ids back to back. ``.idx``: ``MMIDIDX\\0\\0``, u64 version 1, u8 dtype code, u64 sequences, u64
documents + 1, then int32 lengths, int64 byte offsets, int64 first sequence of each document. Here one document is one
sequence. Byte-identical to megatron-core 0.16's ``IndexedDatasetBuilder`` (tested against it).
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refractor_megatron.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[int, type[np.generic]] = {4: np.int32, 8: np.uint16}
#: Megatron stores ids in two bytes below this vocabulary size.
UINT16_BELOW = 65_500


def token_dtype(vocab_size: int) -> type[np.generic]:
    """uint16 or int32, as Megatron chooses."""
    return np.uint16 if vocab_size < UINT16_BELOW else np.int32


class IndexedWriter:
    """Appends documents to ``<prefix>.bin`` and, on ``close``, writes ``<prefix>.idx``."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix = prefix
        self._dtype = token_dtype(vocab_size)
        self._bin = prefix.with_suffix(".bin").open("wb")
        self._hash = hashlib.sha256()
        self._lengths = array("i")
        self.tokens = 0

    def add(self, tokens: npt.NDArray[np.integer[Any]]) -> None:
        """Appends one document's ids."""
        self.add_many(tokens, np.array([len(tokens)], dtype=np.int64))

    def add_many(self, tokens: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.int64]) -> None:
        """Appends documents whose ids lie back to back; ``lengths`` int64 [documents] sum to ``len(tokens)``."""
        assert int(lengths.sum()) == len(tokens)
        data = np.ascontiguousarray(tokens, dtype=self._dtype).view(np.uint8).data
        self._bin.write(data)
        self._hash.update(data)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.tokens += len(tokens)

    def abandon(self) -> None:
        """Closes the file without an index; for a build that failed."""
        self._bin.close()

    def close(self) -> str:
        """Writes the index; returns the sha256 of the ``.bin``."""
        self._bin.close()
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        pointers = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * np.dtype(self._dtype).itemsize, out=pointers[1:])
        code = next(code for code, dtype in _CODES.items() if dtype is self._dtype)
        with self._prefix.with_suffix(".idx").open("wb") as out:
            out.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
            out.write(lengths.tobytes())
            out.write(pointers.tobytes())
            out.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
        return self._hash.hexdigest()


@dataclass(frozen=True)
class Indexed:
    """``tokens``: memory map [total]; ``starts``: int64 [documents + 1], first token of each document and the total."""

    tokens: npt.NDArray[np.integer[Any]]
    starts: npt.NDArray[np.int64]


def read_indexed(prefix: Path) -> Indexed:
    """Opens ``<prefix>.bin/.idx``. Raises ``DataError`` if they are missing, truncated or do not belong together."""
    idx, data = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
    try:
        raw = idx.read_bytes()
        size = data.stat().st_size
    except OSError as error:
        raise DataError(f"Cannot read {error.filename} ({error.strerror}); build the dataset again.") from error
    if len(raw) < _HEADER.size:
        raise DataError(f"{idx} is truncated; build the dataset again.")
    magic, version, code, sequences, documents = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != 1 or code not in _CODES or documents != sequences + 1:
        raise DataError(f"{idx} is not an index of this pipeline; build the dataset again.")
    if len(raw) != _HEADER.size + 12 * sequences + 8 * documents:
        raise DataError(f"{idx} is truncated; build the dataset again.")
    lengths = np.frombuffer(raw, dtype=np.int32, count=sequences, offset=_HEADER.size)
    starts = np.zeros(sequences + 1, dtype=np.int64)
    np.cumsum(lengths, dtype=np.int64, out=starts[1:])
    dtype = np.dtype(_CODES[code])
    if size != int(starts[-1]) * dtype.itemsize:
        raise DataError(
            f"{data} has {size} bytes where its index needs {int(starts[-1]) * dtype.itemsize}; build again."
        )
    return Indexed(np.memmap(data, dtype=dtype, mode="r"), starts)
