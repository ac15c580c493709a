"""Quantised payloads: a fixed rotation of each head vector, then integers of 8 or 11 bits in blocks of 64.

The rotation (signs, then a Hadamard matrix, as in QuaRot and DRIVE) spreads a channel that sticks out over its vector:
without it a block's largest value makes all others coarse. It keeps norms. All arithmetic is numpy's in fp32, because
torch's matrix product may round its inputs (TF32, bf16) when the process asks for speed.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import CheckpointError

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

#: Values that share a scale (spec: blockwise quantisation, 64 elements per block).
BLOCK = 64
#: Signs before the Hadamard matrix, so that no plain pattern in a vector meets a row of it. Part of the format.
_SIGN_BITS = 0x9E3779B97F4A7C15
#: Scales are ``base · 2^(−code / 16)``, code 0 to 255: 16 octaves, each at most 4.4 % too large.
_STEPS_PER_OCTAVE = 16
_SCALES = np.exp2(-np.arange(256) / _STEPS_PER_OCTAVE).astype(np.float32)
#: Relative norm error that is accepted to save one squared step of error in a value, when `keep_norms` chooses.
_PRICE = 2e-4
_BASE = struct.Struct("<f")


@functools.cache
def rotation(d: int) -> Floats:
    """Orthogonal [w, w] that rotates each w neighbours of a vector of d values; w = power of two in d, at most 64."""
    w = min(BLOCK, d & -d)
    i = np.arange(w)
    hadamard = 1 - 2 * (np.bitwise_count(i[:, None] & i) % 2).astype(np.float64)
    signs = 1 - 2 * ((_SIGN_BITS >> i.astype(object)) & 1).astype(np.float64)
    matrix: Floats = (signs[:, None] * hadamard / np.sqrt(w)).astype(np.float32)
    return matrix


def rotated_blocks(tensor: Tensor) -> Floats:
    """[blocks, 64] of the rotated values in order, zeros behind the last."""
    turn = rotation(tensor.shape[-1])
    return in_blocks(_array(tensor).reshape(-1, len(turn)) @ turn)


def from_rotated_blocks(blocks: Floats, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Inverse of `rotated_blocks`, rounded to ``dtype``."""
    turn = rotation(shape[-1])
    values = blocks.reshape(-1)[: math.prod(shape)].reshape(-1, len(turn)) @ turn.T
    return torch.from_numpy(values.reshape(shape)).to(dtype)


def in_blocks(values: Floats) -> Floats:
    """[blocks, 64] of ``values`` in order, zeros behind the last."""
    flat = values.reshape(-1)
    padded = np.zeros((blocks_of(flat.size), BLOCK), np.float32)
    padded.reshape(-1)[: flat.size] = flat
    return padded


def blocks_of(values: int) -> int:
    """Blocks that ``values`` fill."""
    return -(-values // BLOCK)


def _array(tensor: Tensor) -> Floats:
    array: Floats = tensor.to(torch.float32).contiguous().numpy()
    return array


def log_scales(blocks: Floats, top: int) -> tuple[bytes, Bytes, Floats]:
    """Scales under which no value of a block exceeds ``top``: (base as bytes, codes, scales [blocks, 1])."""
    need = np.abs(blocks).max(axis=1, initial=0) / np.float32(top)
    base = _BASE.pack(need.max(initial=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.floor(_STEPS_PER_OCTAVE * np.log2(_BASE.unpack(base)[0] / need.astype(np.float64)))
    codes = np.clip(np.nan_to_num(below, nan=255, posinf=255), 0, 255).astype(np.uint8)
    return base, codes, _scales(base, codes)


def _scales(base: bytes | memoryview, codes: Bytes) -> Floats:
    scales: Floats = np.float32(_BASE.unpack(base)[0]) * _SCALES[codes][:, None]
    return scales


def in_steps(blocks: Floats, scales: Floats) -> Floats:
    """``blocks / scales``; zero where the scale is (the block is zero, or vanishes beside the largest)."""
    return np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0)


def nearest(steps: Floats, top: int) -> Floats:
    """Nearest whole numbers, within ±top."""
    near = np.rint(steps)
    return np.clip(near, -top, top, out=near)


class _Parts:
    """Fields of a payload read one after the other; wrong sizes raise ``CheckpointError``."""

    def __init__(self, payload: memoryview, sizes: list[int]) -> None:
        if len(payload) != sum(sizes):
            raise CheckpointError(
                f"a chunk's payload has {len(payload)} bytes, its shape needs {sum(sizes)}: compute it again."
            )
        ends = np.cumsum(sizes).tolist()
        self.parts = [payload[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def array(self, i: int, dtype: Any) -> npt.NDArray[Any]:
        """Part ``i`` as an array."""
        return np.frombuffer(self.parts[i], dtype)


def pack_int11(tensor: Tensor) -> bytes:
    """Base, scale codes, low bytes, then the three high bits as planes of bits: 11.125 bits a value."""
    blocks = rotated_blocks(tensor)
    base, codes, scales = log_scales(blocks, 1023)
    unsigned = (nearest(in_steps(blocks, scales), 1023) + 1024).astype(np.uint16)
    low, top = unsigned.astype(np.uint8), (unsigned >> 8).astype(np.uint8)
    planes = [np.packbits(top & bit).tobytes() for bit in (1, 2, 4)]
    return b"".join([base, codes.tobytes(), low.tobytes(), *planes])


def unpack_int11(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Inverse of `pack_int11`."""
    n = blocks_of(math.prod(shape))
    parts = _Parts(payload, [_BASE.size, n, n * BLOCK, *3 * [n * BLOCK // 8]])
    unsigned = parts.array(2, np.uint8).astype(np.int16)
    for plane in (0, 1, 2):
        unsigned |= np.unpackbits(parts.array(3 + plane, np.uint8)).astype(np.int16) << (8 + plane)
    blocks = (unsigned - 1024).reshape(n, BLOCK).astype(np.float32)
    return from_rotated_blocks(blocks * _scales(parts.parts[0], parts.array(1, np.uint8)), shape, dtype)


def pack_int8(tensor: Tensor) -> bytes:
    """Base, scale codes, signed bytes whose vectors keep their norms: 8.125 bits a value."""
    blocks = rotated_blocks(tensor)
    base, codes, scales = log_scales(blocks, 127)
    steps = in_steps(blocks, scales)
    near = nearest(steps, 127)
    count, d = tensor.numel(), tensor.shape[-1]
    if count:
        by_vector = (x.reshape(-1)[:count].reshape(-1, d) for x in (steps, near, np.broadcast_to(scales, near.shape)))
        near.reshape(-1)[:count] = keep_norms(*by_vector).reshape(-1)
    return b"".join([base, codes.tobytes(), near.astype(np.int8).tobytes()])


def keep_norms(steps: Floats, near: Floats, scales: Floats) -> Floats:
    """Round one value of each vector the other way where that brings the vector's norm closer to what it was.

    steps: [vectors, d] in units of ``scales``; near: nearest whole numbers. The best of the d choices leaves a fraction
    of the norm's error (a quarter of its rms at d = 32, half at 128) for a few per cent more error in the values; the
    choice weighs both, so that vectors whose norm is right already are left alone.
    """
    largest = scales.max(axis=1, keepdims=True)
    weight = np.divide(scales, largest, out=np.zeros_like(scales), where=largest > 0) ** 2
    off = steps - near
    missing = np.einsum("ij,ij,ij->i", weight, off, steps + near)  # |x|² − |x'|², in units of the largest step
    turn = np.where(off >= 0, np.float32(1), np.float32(-1))
    turn[np.abs(near) == 127] = 0
    left = np.abs(missing[:, None] - weight * (turn * (2 * near + turn)))
    price = _PRICE * 2 * np.einsum("ij,ij,ij->i", weight, steps, steps)[:, None]
    left += price * weight * (1 - 2 * np.abs(off))
    rows, best = np.arange(len(near)), left.argmin(axis=1)
    worth = left[rows, best] < np.abs(missing)
    kept = near.copy()
    kept[rows[worth], best[worth]] += turn[rows[worth], best[worth]]
    return kept


def unpack_int8(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Inverse of `pack_int8`."""
    n = blocks_of(math.prod(shape))
    parts = _Parts(payload, [_BASE.size, n, n * BLOCK])
    blocks = parts.array(2, np.int8).reshape(n, BLOCK).astype(np.float32)
    return from_rotated_blocks(blocks * _scales(parts.parts[0], parts.array(1, np.uint8)), shape, dtype)


def pack_int8_v1(tensor: Tensor) -> bytes:
    """The first form: no rotation, fp16 scales, nearest integers: 8.25 bits a value."""
    blocks = in_blocks(_array(tensor))
    with np.errstate(over="ignore"):
        scales = (np.abs(blocks).max(axis=1, initial=0, keepdims=True) / 127).astype(np.float16)
    near = nearest(in_steps(blocks, scales.astype(np.float32)), 127)
    return b"".join([scales.tobytes(), near.astype(np.int8).tobytes()])


def unpack_int8_v1(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Inverse of `pack_int8_v1`."""
    n = blocks_of(math.prod(shape))
    parts = _Parts(payload, [2 * n, n * BLOCK])
    scales = parts.array(0, np.float16).astype(np.float32)[:, None]
    with np.errstate(invalid="ignore"):
        blocks = parts.array(1, np.int8).reshape(n, BLOCK) * scales
    return torch.from_numpy(blocks.reshape(-1)[: math.prod(shape)].reshape(shape)).to(dtype)
