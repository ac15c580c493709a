"""Documents on disk: shards of bounded size, as Arrow IPC files that map into memory without a copy.

A shard holds one record batch. Its text column is one run of bytes with offsets, which is what the kernels read.
Signals, signatures and decisions lie beside it in files of their own, row by row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipeline.documents import Document, Part
from data_pipeline.provenance import UNDATED, Provenance
from refractor_megatron.distinction.roles import RecordPolicy
from refractor_megatron.errors import DataError

#: A shard is closed once its text passes this (bytes); with one document of ``PART_BYTES`` more at most.
SHARD_BYTES = 16 << 20

_PART = pa.struct([("bytes", pa.int64()), ("role", pa.int32()), ("segment", pa.int64()), ("bits", pa.uint32())])
SCHEMA = pa.schema(
    [
        ("id", pa.binary(16)),  # stable: hash of content and source
        ("key", pa.binary(16)),  # hash of content
        ("group", pa.binary(16)),  # key of the first part of the text that this is a part of; else its own key
        ("source", pa.int32()),  # place in the build's list of sources
        ("file", pa.int32()),  # place in the source's list of files
        ("position", pa.int64()),  # line, row or member within the file, from 1
        ("text", pa.large_binary()),
        ("parts", pa.list_(_PART)),  # of a conversation; null for plain text
        ("origin", pa.string()),  # stated source, or null
        ("timestamp", pa.int64()),
        ("trust", pa.float32()),
        ("policy", pa.uint8()),
        ("ttl_s", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class Located:
    """A document and where it was read: ``file`` in its source's list of files, ``position`` in the file, from 1.

    ``group``: of a text that was cut, the key of its first part; ``None`` stands for the document's own key.
    """

    document: Document
    file: int
    position: int
    group: bytes | None = None


def document_id(key: bytes, source: str) -> bytes:
    """Stable 16-byte id of content ``key`` in a source of this name."""
    return hashlib.blake2b(key + source.encode(), digest_size=16, person=b"document-id").digest()


def write_shard(path: Path, source: int, source_name: str, rows: Sequence[Located]) -> None:
    """Writes ``rows`` as one shard. The bytes depend on the arguments alone."""
    documents = [row.document for row in rows]
    columns: dict[str, Any] = {
        "id": [document_id(one.key, source_name) for one in documents],
        "key": [one.key for one in documents],
        "group": [row.document.key if row.group is None else row.group for row in rows],
        "source": [source] * len(rows),
        "file": [row.file for row in rows],
        "position": [row.position for row in rows],
        "text": [b"".join(part.data for part in one.parts) for one in documents],
        "parts": [parts_of(one) if one.framed else None for one in documents],
        "origin": [one.provenance.source for one in documents],
        "timestamp": [UNDATED if one.provenance.timestamp is None else one.provenance.timestamp for one in documents],
        "trust": [one.provenance.trust for one in documents],
        "policy": [int(one.provenance.policy) for one in documents],
        "ttl_s": [one.provenance.ttl_s for one in documents],
    }
    write_batch(path, pa.RecordBatch.from_arrays([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA))


def write_batch(path: Path, batch: pa.RecordBatch) -> None:
    """Writes a batch of ``SCHEMA`` as a shard."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(batch)


def parts_of(document: Document) -> list[dict[str, int]]:
    """The ``parts`` column of a conversation."""
    return [
        {"bytes": len(part.data), "role": part.role, "segment": part.segment, "bits": part.bits}
        for part in document.parts
    ]


def write_shards(folder: Path, source: int, source_name: str, rows: Iterable[Located]) -> int:
    """Writes ``rows`` as ``folder/00000.arrow`` and so on, each of about ``SHARD_BYTES``; returns their number."""
    held: list[Located] = []
    size = count = 0
    for row in rows:
        held.append(row)
        size += row.document.size
        if size >= SHARD_BYTES:
            write_shard(folder / f"{count:05d}.arrow", source, source_name, held)
            held, size, count = [], 0, count + 1
    if held:
        write_shard(folder / f"{count:05d}.arrow", source, source_name, held)
        count += 1
    return count


class Shard:
    """A shard opened by memory map; arrays are views of the file."""

    def __init__(self, path: Path) -> None:
        """Raises ``DataError`` for a file that is missing, cut short or of another layout."""
        try:
            self._map = pa.memory_map(str(path))
            with pa.ipc.open_file(self._map) as reader:
                if reader.schema != SCHEMA or reader.num_record_batches != 1:
                    raise DataError(f"{path} is no document shard of this version; delete its folder and build again.")
                self.batch: pa.RecordBatch = reader.get_batch(0)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"Cannot read {path} ({reason}); delete its folder and build again.") from error
        self.path = path

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    @property
    def ids(self) -> npt.NDArray[np.uint8]:
        """Stable ids, uint8 [n, 16]."""
        return self._fixed("id")

    @property
    def keys(self) -> npt.NDArray[np.uint8]:
        """Content hashes, uint8 [n, 16]."""
        return self._fixed("key")

    @property
    def groups(self) -> npt.NDArray[np.uint8]:
        """Key of the first part of the text that a document was cut from, its own if it was not; uint8 [n, 16]."""
        return self._fixed("group")

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """An integer or float column [n]: source, file, position, timestamp, trust, policy, ttl_s."""
        values: npt.NDArray[Any] = self.batch.column(name).to_numpy()
        return values

    @property
    def text(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """``(flat, offsets)``: uint8, int64 [n + 1]; document i is ``flat[offsets[i]:offsets[i + 1]]``."""
        column = self.batch.column("text")
        _, offsets, data = column.buffers()
        bounds = np.frombuffer(offsets, dtype=np.int64, count=len(self) + 1, offset=8 * column.offset)
        flat = np.frombuffer(data, dtype=np.uint8) if data is not None and data.size else np.empty(0, np.uint8)
        return flat, bounds

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of text of each document, int64 [n]."""
        return np.diff(self.text[1])

    @property
    def framed(self) -> npt.NDArray[np.bool_]:
        """Which documents are conversations, bool [n]."""
        mask: npt.NDArray[np.bool_] = self.batch.column("parts").is_valid().to_numpy(zero_copy_only=False)
        return mask

    def text_of(self, row: int) -> bytes:
        """All text of a document."""
        flat, offsets = self.text
        return flat[offsets[row] : offsets[row + 1]].tobytes()

    def document(self, row: int) -> Document:
        """The document of a row, parts and provenance included."""
        data, layout = self.text_of(row), self.batch.column("parts")[row].as_py()
        stamp = int(self.numbers("timestamp")[row])
        provenance = Provenance(
            self.batch.column("origin")[row].as_py(),
            None if stamp == UNDATED else stamp,
            float(self.numbers("trust")[row]),
            RecordPolicy(int(self.numbers("policy")[row])),
            int(self.numbers("ttl_s")[row]),
        )
        if layout is None:
            return Document((Part(data),), provenance=provenance)
        parts, start = [], 0
        for one in layout:
            parts.append(Part(data[start : start + one["bytes"]], one["role"], one["segment"], one["bits"]))
            start += one["bytes"]
        return Document(tuple(parts), framed=True, provenance=provenance)

    def __iter__(self) -> Iterator[Document]:
        return map(self.document, range(len(self)))

    def _fixed(self, name: str) -> npt.NDArray[np.uint8]:
        column = self.batch.column(name)
        data = np.frombuffer(column.buffers()[1], dtype=np.uint8, count=16 * len(self), offset=16 * column.offset)
        return data.reshape(-1, 16)
