"""``tensors.json``: shape, type and CRC-32 of every tensor chunk of a Megatron checkpoint.

The manifest's hashes say which *file* of a checkpoint is damaged. This file says which *tensor*, and lets a converter
check the chunks that it reads instead of hashing the optimizer's as well. ``torch.save`` has computed each CRC already
and written it into the chunk's zip directory, so writing the file costs a look at each directory and no pass over data.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from .megatron_metadata import Chunk, Index, View, read_index
from .tensors import raw

FILE = "tensors.json"
SCHEMA_VERSION = 1

#: key -> {"shape": [...], "dtype": "float32", "crc32": {"0,0": 123}}
Checksums = dict[str, dict[str, Any]]


def write(folder: Path) -> None:
    """Write ``tensors.json`` of the checkpoint whose other files ``folder`` already holds (before the manifest)."""
    index = read_index(folder)
    (folder / FILE).write_text(json.dumps({"schema_version": SCHEMA_VERSION, "tensors": _collect(folder, index)}))


def read(folder: Path) -> Checksums | None:
    """Content of ``tensors.json``; None where a checkpoint has none.

    Raises:
        CheckpointError: it is damaged or of a schema this version does not know.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if content["schema_version"] != SCHEMA_VERSION:
            raise CheckpointError(f"{path} has schema version {content['schema_version']}, not {SCHEMA_VERSION}.")
        tensors: Checksums = content["tensors"]
        return tensors
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): take another checkpoint.") from None


def place(chunk: Chunk) -> str:
    """Name of a chunk within its tensor: its offsets."""
    return ",".join(map(str, chunk.offsets))


def crc32(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes, as ``torch.save`` computes it."""
    return zlib.crc32(raw(tensor.contiguous()))


def stored_crc32(folder: Path, chunk: Chunk) -> int:
    """The CRC-32 that stands in a chunk's zip directory. Raises ``zipfile.BadZipFile`` when there is no directory."""
    with open(folder / chunk.file, "rb", buffering=0) as file, zipfile.ZipFile(_part(file, chunk)) as archive:
        (data,) = (info for info in archive.infolist() if info.filename.endswith("/data/0"))
        return data.CRC


def is_intact(folder: Path, chunk: Chunk) -> bool:
    """Whether a chunk's bytes still have the CRC that its own zip directory says."""
    try:
        with open(folder / chunk.file, "rb", buffering=0) as file, zipfile.ZipFile(_part(file, chunk)) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, OSError, ValueError):
        return False


def _part(file: Any, chunk: Chunk) -> Any:
    return View(file, chunk.start, chunk.length)


def _collect(folder: Path, index: Index) -> Checksums:
    return {
        key: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "crc32": {place(chunk): stored_crc32(folder, chunk) for chunk in tensor.chunks},
        }
        for key, tensor in index.tensors.items()
    }
