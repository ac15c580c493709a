"""Where the numbers of a tensor lie that ``torch.save`` wrote: found without loading them or running its pickle."""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import sys
import zipfile
from collections.abc import Sequence
from typing import Any, BinaryIO

import torch

#: Storage classes by the name that a pickle has for them.
_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}
#: The part of a zip member's own header before its name: two lengths stand at its end.
_HEADER, _LENGTHS = 30, struct.Struct("<HH")


def numbers_start(file: BinaryIO, sizes: Sequence[int], dtype: torch.dtype) -> int | None:
    """Offset in ``file`` of a saved tensor's numbers; None where only ``torch.load`` knows (not in a row, odd type).

    Raises:
        ValueError, zipfile.BadZipFile, pickle.UnpicklingError: it is not such a tensor, or damaged.
    """
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        arguments = _Pickle(io.BytesIO(archive.read(members["data.pkl"]))).load()
        order = archive.read(members["byteorder"]).decode() if "byteorder" in members else sys.byteorder
        if not isinstance(arguments, tuple) or order != sys.byteorder:
            return None
        (_, found, key, *_), offset, shape, stride, *_ = arguments
        if found != dtype or math.prod(shape) != math.prod(sizes):
            raise ValueError(f"it holds {found} {list(shape)}")
        if not _in_a_row(shape, stride):
            return None
        data = members[f"data/{key}"]
        if data.compress_type != zipfile.ZIP_STORED or data.file_size < (offset + math.prod(shape)) * dtype.itemsize:
            raise ValueError("it ends within the numbers")
        file.seek(data.header_offset + _HEADER - _LENGTHS.size)
        name, extra = _LENGTHS.unpack(file.read(_LENGTHS.size))
        return int(data.header_offset + _HEADER + name + extra + offset * dtype.itemsize)


class _Pickle(pickle.Unpickler):
    """Reads the arguments from which a tensor would be built again, and refuses to build anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Names that a saved tensor has."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: arguments
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a saved tensor")

    def persistent_load(self, pid: Any) -> Any:
        """("storage", type, key, device, elements)."""
        return pid


def _in_a_row(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor is contiguous; the stride of a single place does not matter."""
    return all(
        size == 1 or step == math.prod(shape[n + 1 :]) for n, (size, step) in enumerate(zip(shape, stride, strict=True))
    )
