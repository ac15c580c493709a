"""Lossless payload: exponents apart from signs and mantissas, each plane of bytes compressed by itself.

Keys and values of one tensor have few different exponents (about 2.6 bits each, the DFloat11 observation), while their
mantissas are noise. Rotating each word left by one bit puts the sign last, so that the top byte is exponent only.
"""

from __future__ import annotations

import contextlib
import math
import struct

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from torch import Tensor

from ..errors import CheckpointError

#: Entropy coding is all that helps; higher levels search for matches that mantissas do not have.
LEVEL = 1
_SIZE = struct.Struct("<I")
_WORDS = {2: (torch.int16, "<u2"), 4: (torch.int32, "<u4")}


def pack(tensor: Tensor) -> bytes:
    """Planes of bytes, top byte first, each as (u32 size, zstd frame)."""
    integer, word = _WORDS[tensor.element_size()]
    bits = tensor.contiguous().view(integer).numpy().reshape(-1).view(word)
    last = 8 * tensor.element_size() - 1
    turned = ((bits << 1) | (bits >> last)).astype(word, copy=False)
    planes = turned.view(np.uint8).reshape(-1, tensor.element_size())
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    frames = [compressor.compress(planes[:, i].tobytes()) for i in reversed(range(planes.shape[1]))]
    return b"".join(_SIZE.pack(len(frame)) + frame for frame in frames)


def unpack(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor, bit by bit.

    Raises:
        CheckpointError: the payload does not hold the planes of such a tensor.
    """
    integer, word = _WORDS[dtype.itemsize]
    values, at, planes = math.prod(shape), 0, []
    for _ in range(dtype.itemsize):
        size = _SIZE.unpack_from(payload, at)[0] if at + _SIZE.size <= len(payload) else 0
        at += _SIZE.size
        planes.append(_plane(payload[at : at + size], values))
        at += size
    turned = np.stack(planes[::-1], axis=1).reshape(-1).view(word)
    bits = ((turned >> 1) | (turned << (8 * dtype.itemsize - 1))).astype(word, copy=False)
    return torch.from_numpy(bits.view(word.replace("u", "i"))).view(integer).view(dtype).reshape(shape)


def _plane(frame: memoryview, values: int) -> npt.NDArray[np.uint8]:
    """One plane. Its frame states its size, which is compared before anything is allocated."""
    with contextlib.suppress(zstandard.ZstdError):
        if zstandard.frame_content_size(frame) == values:
            return np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)
    raise CheckpointError(f"an exact chunk does not hold the planes of its {values} values: compute it again.")
