"""safetensors files, read and written tensor by tensor.

The format: eight bytes with the length of a JSON header, the header (name -> dtype, shape, offsets), then the bytes of
all tensors without a gap. Shapes are known before any data is, so the header comes first and data streams behind it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from . import direct_file
from .buffers import Buffers
from .direct_file import DirectFile
from .tensors import DTYPES, dtype_name, raw, sha256

#: Headers beyond this are refused by the format's own library too.
_LONGEST_HEADER = 100_000_000
_ALIGNMENT = 8


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    start: int  # of the tensor's bytes, from the beginning of the file
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Stored]:
    """Tensors of a file by name.

    Raises:
        CheckpointError: missing, truncated or damaged, or of a dtype that conversion does not know.
    """
    way_out = "copy it again, or export the model again"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, _LONGEST_HEADER):
                raise CheckpointError(f"{path} is truncated or no safetensors file ({size} bytes): {way_out}.")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return _check_header(path, header, 8 + length, size)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {way_out}.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} has a damaged header ({str(error)[:80]}): {way_out}.") from None


def _check_header(path: Path, header: dict[str, Any], data: int, size: int) -> dict[str, Stored]:
    """Every tensor has a known type and bytes of its own, and together they are the rest of the file."""
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"tensor {name} of {path} has dtype {entry['dtype']}, and conversion knows {', '.join(DTYPES)}: save "
                "the weights in one of them."
            )
        start, stop = entry["data_offsets"]
        found[name] = Stored(path, data + start, tuple(entry["shape"]), DTYPES[entry["dtype"]])
        if stop - start != found[name].nbytes:
            raise CheckpointError(f"tensor {name} of {path} has {stop - start} bytes, its shape asks for others.")
    at = data
    for name, tensor in sorted(found.items(), key=lambda item: item[1].start):
        if tensor.start != at:
            raise CheckpointError(f"tensor {name} of {path} does not follow the one before it: the file is damaged.")
        at += tensor.nbytes
        if at > size:
            raise CheckpointError(f"{path} is truncated within tensor {name} ({size} bytes, its header asks for more).")
    if at != size:
        raise CheckpointError(f"{path} has {size - at} bytes behind its last tensor: the file is damaged.")
    return found


def read_tensor(stored: Stored, buffers: Buffers | None = None) -> Tensor:
    """The tensor's numbers, in memory of their own, which ``buffers`` gives."""
    try:
        return direct_file.read_tensor(stored.file, stored.start, stored.shape, stored.dtype, buffers or Buffers())
    except EOFError:
        raise CheckpointError(f"{stored.file} ends within a tensor: it was truncated.") from None


class SafetensorsWriter:
    """Writes one file; tensors come in the order of ``specs``. Hashing runs beside writing, in another thread.

    ``digests`` has the sha256 of each tensor once the file is closed.
    """

    def __init__(self, path: Path, specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._specs, self._next = dict(specs), list(specs)
        self._hashes: dict[str, Future[str]] = {}
        self._worker = ThreadPoolExecutor(1)
        self.digests: dict[str, str] = {}
        self.path = path
        self._file = DirectFile(path)
        self._file.write(self._header())

    def _header(self) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, (shape, dtype) in self._specs.items():
            stop = at + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": dtype_name(dtype, name), "shape": list(shape), "data_offsets": [at, stop]}
            at = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return struct.pack("<Q", len(text)) + text

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor, the next one of ``specs``."""
        expected = self._next.pop(0)
        assert (name, tuple(tensor.shape), tensor.dtype) == (expected, *self._specs[name]), (name, expected)
        tensor = tensor.contiguous()
        self._hashes[name] = self._worker.submit(sha256, tensor)
        self._file.write(raw(tensor))
        self.digests[name] = self._hashes.pop(name).result()  # the tensor is not held longer than this call

    def close(self, *, whole: bool = True) -> None:
        """Finish the file; ``whole=False`` after a failure, when not every tensor has come."""
        self._worker.shutdown()
        if not whole:
            self._file.abort()
            return
        assert not self._next, self._next
        self._file.close()
