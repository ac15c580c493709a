"""Write a Megatron checkpoint that ``dist_checkpointing.load`` takes on any grid, holding one shard at a time."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from ...compat.megatron import dist_checkpointing
from . import checksums
from .mapping import Entry, Table, global_shapes
from .megatron_folder import EMA
from .shape import Shape

Read = Callable[[Entry], Tensor]


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
) -> None:
    """Write everything of a checkpoint but its manifest.

    Args:
        folder: empty. dtypes: of every key. read: gives an entry's tensor; asked once for each.
        ema: write the weights as their own average too. progress: step counters, ``training.state.Progress``.
        shard_size: bytes of a data file and of what is held in memory, unless one tensor is larger.
    """
    pieces = [_Piece(entry, key) for entry in entries for key in ([entry.key, EMA + entry.key] if ema else [entry.key])]
    objects = extra_states(shape)
    planner = _Planner(pieces, dtypes, read)
    writer = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True, rank=0)
    plans = [SavePlan([_object_item(key) for key in objects])]
    plans += [SavePlan([_item(p, dtypes) for p in shard]) for shard in _shards(pieces, dtypes, shard_size)]
    # one plan after the other: the writer keeps every tensor of a plan until the plan is done
    results = [writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)]
    writer.finish(_metadata(pieces, objects, entries, dtypes), results)
    torch.save({"progress": progress}, folder / "common.pt")
    dist_checkpointing.core.save_config(dist_checkpointing.core.CheckpointingConfig("torch_dist", 1), str(folder))
    checksums.write(folder)


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


class _Planner(SavePlanner):
    """Finds the data of a plan's items when the writer asks. An entry under two keys is read once."""

    def __init__(self, pieces: list[_Piece], dtypes: dict[str, torch.dtype], read: Read) -> None:
        self._pieces = {_index(piece): piece for piece in pieces}
        self._dtypes, self._read = dtypes, read
        self._last: tuple[Entry, Tensor] | None = None

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The tensor, or the bytes of "nothing" as Megatron writes it."""
        if write_item.type is WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([None], buffer)
            buffer.seek(0)
            return buffer
        piece = self._pieces[write_item.index]
        if self._last is None or self._last[0] is not piece.entry:
            self._last = None
            self._last = piece.entry, self._read(piece.entry)
        tensor = self._last[1]
        assert tuple(tensor.shape) == piece.entry.shape and tensor.dtype == self._dtypes[piece.entry.key], piece
        return tensor.reshape(piece.sizes)

    # The plans are made above: nothing of what ``save_state_dict`` would ask for is needed.
    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Not used."""
        raise NotImplementedError

    def create_local_plan(self) -> SavePlan:
        """Not used."""
        raise NotImplementedError

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Not used."""
        raise NotImplementedError

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Not used."""
        raise NotImplementedError


def _index(piece: _Piece) -> MetadataIndex:
    return MetadataIndex(piece.key, piece.offsets)


def _properties(piece: _Piece, dtypes: dict[str, torch.dtype]) -> TensorProperties:
    return TensorProperties(dtype=dtypes[piece.entry.key])


def _chunk(piece: _Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))


def _item(piece: _Piece, dtypes: dict[str, torch.dtype]) -> WriteItem:
    data = TensorWriteData(_chunk(piece), _properties(piece, dtypes), torch.Size(piece.sizes))
    return WriteItem(_index(piece), WriteItemType.TENSOR, tensor_data=data)


def _object_item(key: str) -> WriteItem:
    return WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO)


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
