"""The index of a torch_dist checkpoint, read without a process group and without running what a pickle may hold."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ...errors import CheckpointError

METADATA = ".metadata"

#: What an honest index is made of. An index that names anything else is refused before it is built.
_ALLOWED_MODULES = tuple(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner"))
_ALLOWED = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
}


@dataclass(frozen=True)
class Chunk:
    """A stored box of a tensor: where it lies in the tensor, and where its bytes lie in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint, in chunks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Index:
    """Everything that a checkpoint holds: tensors by key, and other objects by key with their place."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, Chunk]


def read_index(folder: Path) -> Index:
    """Read ``folder/.metadata``.

    Raises:
        CheckpointError: it is missing, damaged, or holds what no checkpoint index holds.
    """
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
        assert isinstance(metadata, Metadata), type(metadata)
        return _index(metadata)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is not whole, take another one.") from None
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises whatever it likes
        text = str(error)[:100] or type(error).__name__
        raise CheckpointError(f"{path} is damaged ({text}): take another checkpoint.") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        named_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if named_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if (
            module in _ALLOWED_MODULES
            and "." not in name
            and isinstance(found := super().find_class(module, name), type)
        ):
            return found
        raise CheckpointError(f"a checkpoint index names {module}.{name}, which it has no use for: do not trust it.")


def _index(metadata: Metadata) -> Index:
    tensors, objects = {}, {}
    places = {(at.fqn, tuple(at.offset) if at.offset is not None else None): at for at in metadata.storage_data}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            info = metadata.storage_data[places[key, None]]
            objects[key] = Chunk((), (), info.relative_path, info.offset, info.length)
            continue
        chunks = []
        for chunk in entry.chunks:
            info = metadata.storage_data[places[key, tuple(chunk.offsets)]]
            at = tuple(chunk.offsets), tuple(chunk.sizes)
            chunks.append(Chunk(*at, info.relative_path, info.offset, info.length))
        tensors[key] = StoredTensor(tuple(entry.size), entry.properties.dtype, tuple(chunks))
    return Index(tensors, objects)


class View(io.RawIOBase):
    """``length`` bytes of a file from ``start`` on, as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Position within the part."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move within the part."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as the part goes."""
        out = memoryview(buffer).cast("B")
        out = out[: max(0, min(len(out), self._length - self._at))]
        self._file.seek(self._start + self._at)
        done = 0
        while done < len(out):
            count = self._file.readinto(out[done:])  # type: ignore[attr-defined]
            if not count:
                break
            done += count
        self._at += done
        return done
