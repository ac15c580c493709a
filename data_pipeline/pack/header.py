"""The head of a binary file of ours: magic, version, counts."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from refractor_megatron.errors import DataError


def read_header(path: Path, header: struct.Struct, magic: bytes, what: str) -> tuple[tuple[Any, ...], int]:
    """Fields of the header after the magic, and the file's size in bytes.

    Raises ``DataError`` for a file that cannot be read or is no ``what``.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(header.size)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"Cannot read {path} ({error.strerror}); build the dataset again.") from error
    if len(head) < header.size or head[: len(magic)] != magic:
        raise DataError(f"{path} is not a {what}; build the dataset again.")
    return header.unpack(head)[1:], size
