"""Write a Megatron checkpoint that ``dist_checkpointing.load`` takes on any grid, holding one shard at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from ...compat.megatron import dist_checkpointing
from . import checksums
from .direct_file import DirectFile
from .mapping import Entry, Table, global_shapes
from .megatron_folder import EMA
from .shape import Shape

Read = Callable[[Entry], Tensor]
Records = dict[str, dict[str, Any]]  # file -> its size and sha256


@dataclass(frozen=True)
class _Piece:
    """One chunk to write: an entry of the table, under one of its keys."""

    entry: Entry
    key: str

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the chunk begins in the whole tensor."""
        zeros = (0,) * len(self.entry.shape)
        return zeros if self.entry.expert is None else (self.entry.expert, *zeros)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Extent of the chunk in the whole tensor."""
        return self.entry.shape if self.entry.expert is None else (1, *self.entry.shape)


def write_checkpoint(
    folder: Path,
    shape: Shape,
    entries: Table,
    dtypes: dict[str, torch.dtype],
    read: Read,
    *,
    ema: bool,
    progress: dict[str, int],
    shard_size: int,
) -> Records:
    """Write everything of a checkpoint but its manifest; returns the manifest's records of the data files.

    Args:
        folder: empty. dtypes: of every key. read: gives an entry's tensor; asked once for each.
        ema: write the weights as their own average too. progress: step counters, ``training.state.Progress``.
        shard_size: bytes of a data file and of what is held in memory, unless one tensor is larger.
    """
    pieces = [_Piece(entry, key) for entry in entries for key in ([entry.key, EMA + entry.key] if ema else [entry.key])]
    objects = extra_states(shape)
    records: Records = {}
    results: list[list[WriteResult]] = []
    with _shard(folder, 0, records) as (name, file):
        results.append([_write_nothing(file, name, key) for key in objects])
    tensors = _Tensors(dtypes, read)
    for number, shard in enumerate(_shards(pieces, dtypes, shard_size), start=1):
        with _shard(folder, number, records) as (name, file):
            results.append([_write_piece(file, name, piece, tensors.of(piece)) for piece in shard])
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(True, rank=0)
    writer.finish(_metadata(pieces, objects, entries, dtypes), results)
    torch.save({"progress": progress}, folder / "common.pt")
    dist_checkpointing.core.save_config(dist_checkpointing.core.CheckpointingConfig("torch_dist", 1), str(folder))
    checksums.write(folder)
    return records


@contextmanager
def _shard(folder: Path, number: int, records: Records) -> Iterator[tuple[str, DirectFile]]:
    """A data file under the name that torch's own writer would give it; whole and on the disk after the block."""
    name = f"__{number}_0.distcp"
    file = DirectFile(folder / name, digest=True)
    try:
        yield name, file
    except BaseException:
        file.abort()
        raise
    file.close()
    records[name] = file.record


# torch's writer keeps every tensor of a file until the file is done, and so cannot write from memory that is used again
def _write_piece(file: DirectFile, name: str, piece: _Piece, tensor: Tensor) -> WriteResult:
    start = file.tell()
    torch.save(tensor, cast(IO[bytes], file))
    return _result(_index(piece), name, start, file)


def _write_nothing(file: DirectFile, name: str, key: str) -> WriteResult:
    """The bytes of "nothing" as Megatron writes it."""
    start = file.tell()
    torch.save([None], cast(IO[bytes], file))
    return _result(MetadataIndex(key), name, start, file)


def _result(index: MetadataIndex, name: str, start: int, file: DirectFile) -> WriteResult:
    length = file.tell() - start
    return WriteResult(index=index, size_in_bytes=length, storage_data=_StorageInfo(name, start, length))


def extra_states(shape: Shape) -> list[str]:
    """Keys of the empty objects that Megatron wants beside its linear layers."""
    keys = []
    for number in range(len(shape.layers)):
        layer = f"decoder.layers.{number}"
        keys += [f"{layer}.self_attention.linear_{name}._extra_state/shard_0_1" for name in ("proj", "qkv")]
        module = f"{layer}.mlp.experts.experts" if shape.experts else f"{layer}.mlp"
        parts = [f"shard_{n}_{shape.experts}" for n in range(shape.experts)] or ["shard_0_1"]
        keys += [f"{module}.{name}._extra_state/{part}" for name in ("linear_fc1", "linear_fc2") for part in parts]
    return keys


class _Tensors:
    """Finds the data of a piece. An entry under two keys is read once."""

    def __init__(self, dtypes: dict[str, torch.dtype], read: Read) -> None:
        self._dtypes, self._read = dtypes, read
        self._last: tuple[Entry, Tensor] | None = None

    def of(self, piece: _Piece) -> Tensor:
        """The tensor in the shape of the chunk."""
        if self._last is None or self._last[0] is not piece.entry:
            self._last = None
            self._last = piece.entry, self._read(piece.entry)
        tensor = self._last[1]
        assert tuple(tensor.shape) == piece.entry.shape and tensor.dtype == self._dtypes[piece.entry.key], piece
        return tensor.reshape(piece.sizes)


def _index(piece: _Piece) -> MetadataIndex:
    return MetadataIndex(piece.key, piece.offsets)


def _properties(piece: _Piece, dtypes: dict[str, torch.dtype]) -> TensorProperties:
    return TensorProperties(dtype=dtypes[piece.entry.key])


def _chunk(piece: _Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))


def _shards(pieces: list[_Piece], dtypes: dict[str, torch.dtype], size: int) -> Iterator[list[_Piece]]:
    """Groups of at most ``size`` bytes, or one piece."""
    shard: list[_Piece] = []
    held = 0
    for piece in pieces:
        own = torch.Size(piece.sizes).numel() * dtypes[piece.entry.key].itemsize
        if shard and held + own > size:
            yield shard
            shard, held = [], 0
        shard.append(piece)
        held += own
    yield shard


def _metadata(pieces: list[_Piece], objects: list[str], entries: Table, dtypes: dict[str, torch.dtype]) -> Metadata:
    shapes = global_shapes(entries)
    found: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    for piece in pieces:
        if piece.key not in found:
            whole = torch.Size(shapes[piece.entry.key])
            found[piece.key] = TensorStorageMetadata(_properties(piece, dtypes), whole, [])
        found[piece.key].chunks.append(_chunk(piece))
    return Metadata(found)
