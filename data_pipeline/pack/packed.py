"""``stage-<length>.pack``: which tokens make which sequence of a stage, and how often each domain is drawn.

Layout, little endian: 8-byte magic, u32 version, u32 stores, u64 tokens of a sequence, u64 sequences, u64 pieces, u64
domains; then u64 [stores], tokens of each store; int64 [domains, 2] = (sequences, samples in a period of the mix);
int64 [sequences + 1], first piece of each sequence; int64 [pieces, 3] = (store, first token, tokens). Sequences stand
in the order of their domains. Every sequence is exactly full.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.pack.header import read_header
from refractor_megatron.errors import DataError

_MAGIC = b"RFRCPCK\x00"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQQQ")
#: Where the tokens of a piece lie: ``<store>.bin``.
STORES = ("train", "tasks")
_BLOCK = 1 << 20  # pieces checked at once

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packed:
    """A packed stage.

    ``capacity``: tokens of a sequence, one more than the stage's length; ``stores`` int64 [stores]: tokens of each of
    ``STORES`` when it was packed; ``sequences`` and ``slots`` int64 [domains]: sequences of each domain and its samples
    in a period of the mix; ``starts`` int64 [sequences + 1]; ``pieces`` int64 [pieces, 3].
    """

    capacity: int
    stores: Ints
    sequences: Ints
    slots: Ints
    starts: Ints
    pieces: Ints

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of(self, sequence: int) -> Ints:
        """The pieces of a sequence, int64 [k, 3] = (store, first token, tokens)."""
        return np.asarray(self.pieces[self.starts[sequence] : self.starts[sequence + 1]])

    def cu_seqlens(self, sequence: int) -> npt.NDArray[np.int32]:
        """Borders of the pieces within a sequence, int32 [k + 1], from 0 to ``capacity``: what attention kernels for
        variable lengths take."""
        return np.concatenate([[0], np.cumsum(self.of(sequence)[:, 2])]).astype(np.int32)

    @property
    def domains(self) -> npt.NDArray[np.int32]:
        """Domain of each sequence, int32 [sequences]."""
        return np.repeat(np.arange(len(self.sequences), dtype=np.int32), self.sequences)


def path_of(folder: Path, length: int) -> Path:
    """Where the stage of sequences of ``length`` lies in a dataset's folder."""
    return folder / f"stage-{length}.pack"


def write_packed(path: Path, packed: Packed) -> str:
    """Writes the file; returns its sha256."""
    assert len(packed.stores) <= len(STORES) and int(packed.sequences.sum()) == len(packed)
    sizes = (packed.capacity, len(packed), len(packed.pieces), len(packed.sequences))
    digest = hashlib.sha256()
    with path.open("wb") as out:
        for part in (
            _HEADER.pack(_MAGIC, VERSION, len(packed.stores), *sizes),
            packed.stores.astype("<u8").data,
            np.stack([packed.sequences, packed.slots], axis=1).astype("<i8").data,
            packed.starts.astype("<i8").data,
            np.ascontiguousarray(packed.pieces, dtype="<i8").data,
        ):
            out.write(part)
            digest.update(part)
    return digest.hexdigest()


def read_packed(path: Path) -> Packed:
    """Opens a packed stage by memory map and checks every number in it.

    Raises ``DataError`` if it is missing, truncated, or holds a sequence that is not full or a piece outside its store.
    """
    (version, stores, capacity, sequences, pieces, domains), size = read_header(path, _HEADER, _MAGIC, "packed stage")
    if version != VERSION:
        raise DataError(f"{path} has pack format version {version}, this code reads {VERSION}; build it again.")
    if size != _HEADER.size + 8 * (stores + 2 * domains + sequences + 1 + 3 * pieces):
        raise DataError(f"{path} is truncated; build the dataset again.")
    content = np.memmap(path, dtype="<i8", mode="r", offset=_HEADER.size)
    ends = np.cumsum([stores, 2 * domains, sequences + 1]).tolist()
    table = np.array(content[ends[0] : ends[1]]).reshape(domains, 2)
    packed = Packed(
        capacity,
        np.array(content[: ends[0]]),
        table[:, 0],
        table[:, 1],
        content[ends[1] : ends[2]],
        content[ends[2] :].reshape(pieces, 3),
    )
    if not _sound(packed):
        raise DataError(f"{path} contradicts itself; delete its folder and build the dataset again.")
    return packed


def _sound(packed: Packed) -> bool:
    """Whether every sequence is full, every piece lies in its store, and the domains cover the sequences."""
    if not 1 <= len(packed.stores) <= len(STORES) or packed.starts[0] != 0 or packed.starts[-1] != len(packed.pieces):
        return False
    if packed.sequences.min(initial=0) < 0 or int(packed.sequences.sum()) != len(packed):
        return False
    if (
        packed.slots.min(initial=0) < 0
        or np.any((packed.slots > 0) & (packed.sequences == 0))
        or not packed.slots.sum()
    ):
        return False
    tokens, borders = 0, [np.zeros(1, dtype=np.int64)]
    for low in range(0, len(packed.pieces), _BLOCK):
        store, first, length = packed.pieces[low : low + _BLOCK].T
        if store.min() < 0 or store.max() >= len(packed.stores) or first.min() < 0 or length.min() < 1:
            return False
        if np.any(length > packed.stores[store] - first):
            return False
        borders.append(tokens + np.cumsum(length))
        tokens = int(borders[-1][-1])
    # each sequence ends at a multiple of the capacity
    if np.any(np.diff(packed.starts) < 1):
        return False
    ends = np.concatenate(borders)[packed.starts]
    return bool(np.array_equal(ends, np.arange(len(packed) + 1) * packed.capacity))
