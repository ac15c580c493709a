"""The frame around every encoded chunk: a checked header, then the codec's payload.

Little-endian: magic ``RFKV``, layout, codec, codec version, codec asked for, dtype, metric, number of dimensions, zero,
measured error (f64), payload bytes (u64), CRC-32 of the payload (u32), the dimensions (u32 each), and the CRC-32 of all
of that. A flipped bit anywhere fails one of the two checksums.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass

import torch

from ..errors import CheckpointError

MAGIC = b"RFKV"
#: Of the header; a codec's payload has a version of its own.
LAYOUT = 1
_HEAD = struct.Struct("<4s8BdQI")
_DIMENSION = struct.Struct("<I")
_CHECKSUM = struct.Struct("<I")

DTYPES = {1: torch.float16, 2: torch.bfloat16, 3: torch.float32}
_DTYPE_IDS = {dtype: number for number, dtype in DTYPES.items()}
#: What the measured error means, see ``metrics``.
METRICS = {0: "bitwise", 1: "relative_frobenius", 2: "norms"}
_METRIC_IDS = {name: number for number, name in METRICS.items()}


@dataclass(frozen=True)
class Header:
    """What a chunk says about itself. ``codec`` made the payload; ``asked`` differs where its bound was missed."""

    codec: int
    version: int
    asked: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    metric: str
    error: float
    payload_bytes: int
    payload_crc: int

    @property
    def values(self) -> int:
        """Number of values encoded."""
        return math.prod(self.shape)


def holds(dtype: torch.dtype) -> bool:
    """Whether a chunk can hold values of ``dtype``."""
    return dtype in _DTYPE_IDS


def seal(
    payload: bytes,
    *,
    codec: int,
    version: int,
    asked: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    metric: str,
    error: float,
) -> bytes:
    """Header and payload as one byte string."""
    head = _HEAD.pack(
        MAGIC, LAYOUT, codec, version, asked, _DTYPE_IDS[dtype], _METRIC_IDS[metric], len(shape), 0,
        error, len(payload), zlib.crc32(payload),
    )  # fmt: skip
    head += b"".join(map(_DIMENSION.pack, shape))
    return head + _CHECKSUM.pack(zlib.crc32(head)) + payload


def open_frame(data: bytes, where: str) -> tuple[Header, memoryview]:
    """Header and payload of ``data``, both checked; ``where`` names the chunk in messages.

    Raises:
        CheckpointError: not a chunk, truncated, altered, or of a layout or dtype this version does not know.
    """
    header, start = read_header(data, where)
    payload = memoryview(data)[start:]
    if len(payload) != header.payload_bytes:
        kind = "truncated" if len(payload) < header.payload_bytes else "followed by other bytes"
        raise CheckpointError(
            f"{where} is {kind} ({len(payload)} bytes of payload, its header says {header.payload_bytes}): "
            "compute it again."
        )
    if zlib.crc32(payload) != header.payload_crc:
        raise CheckpointError(f"{where} is damaged (its payload fails its CRC-32): compute it again.")
    return header, payload


def read_header(data: bytes, where: str) -> tuple[Header, int]:
    """Header of ``data`` and where its payload starts; the payload is not looked at. Raises as `open_frame`."""
    if data[: len(MAGIC)] != MAGIC:
        raise CheckpointError(f"{where} is not an encoded chunk (it does not begin with {MAGIC.decode()}).")
    if len(data) < _HEAD.size:
        raise CheckpointError(f"{where} is truncated inside its header ({len(data)} bytes): compute it again.")
    _, layout, codec, version, asked, dtype, metric, dims, _, error, size, crc = _HEAD.unpack_from(data)
    end = _HEAD.size + dims * _DIMENSION.size
    if len(data) < end + _CHECKSUM.size:
        raise CheckpointError(f"{where} is truncated inside its header ({len(data)} bytes): compute it again.")
    if zlib.crc32(data[:end]) != _CHECKSUM.unpack_from(data, end)[0]:
        raise CheckpointError(f"{where} is damaged (its header fails its CRC-32): compute it again.")
    # The header is as it was written: what is unknown from here on was written by another version.
    if layout != LAYOUT or dtype not in DTYPES or metric not in METRICS:
        raise CheckpointError(
            f"{where} has header layout {layout}, dtype {dtype} and metric {metric}, this version reads layout "
            f"{LAYOUT}, dtypes up to {max(DTYPES)} and metrics up to {max(METRICS)}: read it with the version that "
            "wrote it."
        )
    shape = tuple(_DIMENSION.unpack_from(data, _HEAD.size + i * _DIMENSION.size)[0] for i in range(dims))
    fields = (DTYPES[dtype], shape, METRICS[metric], error, size, crc)
    return Header(codec, version, asked, *fields), end + _CHECKSUM.size
