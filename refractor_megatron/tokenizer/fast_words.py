"""Eight bytes at a time: what numba lacks for reading text as machine words (x86 and ARM, little endian)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

Bytes = npt.NDArray[np.uint8]
_U64 = ir.IntType(64)

_ONES = np.uint64(0x0101010101010101)
HIGH = np.uint64(0x8080808080808080)
_LOW = np.uint64(0x7F7F7F7F7F7F7F7F)
_CASE = np.uint64(0x20) * _ONES
_FROM_A = np.uint64(0x80 - ord("a")) * _ONES
_ABOVE_Z = np.uint64(0x80 - ord("z") - 1) * _ONES
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


def _element(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Pointer to an array's element, as a pointer to a word."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index], inbounds=True), _U64.as_pointer())


@intrinsic
def _load64(typing: Any, array: Any, index: Any) -> Any:
    """Eight bytes of ``array`` from ``index`` as a little-endian word, at any alignment. The caller keeps bounds."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _element(context, builder, signature.args[0], *arguments)
        return builder.load(pointer, align=1)

    return types.uint64(array, types.intp), generate


@intrinsic
def _store64(typing: Any, array: Any, index: Any, word: Any) -> Any:
    """Writes a word over eight bytes of ``array`` from element ``index``. The caller keeps bounds."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _element(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.uint64), generate


@intrinsic
def _trailing_zeros(typing: Any, word: Any) -> Any:
    """Zero bits below the lowest one bit of a word; 64 for zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


# Called with the arguments after ``typing``, which their declared type does not say.
load64: Any = _load64
store64: Any = _store64
trailing_zeros: Any = _trailing_zeros


@njit(inline="always")
def signed(word: np.uint64) -> int:
    """A word as a signed integer: numba makes a float of a signed and an unsigned one."""
    return np.int64(word)  # type: ignore[return-value]


@njit(inline="always")
def leading_letters(word: np.uint64) -> int:
    """How many of a word's first bytes are ASCII letters (0..8)."""
    folded = (word | _CASE) & _LOW
    letters = (folded + _FROM_A) & ~(folded + _ABOVE_Z) & ~word & HIGH
    return signed(trailing_zeros(letters ^ HIGH) >> np.uint64(3))


@njit(inline="always")
def masked(word: np.uint64, size: int) -> np.uint64:
    """The first ``size`` bytes of a word, the others zero; no bytes where ``size`` <= 0, all from 8 on."""
    if size >= 8:
        return word
    if size <= 0:
        return np.uint64(0)
    return word & (_ALL >> np.uint64(64 - 8 * size))


@njit(inline="always")
def word_at(data: Bytes, start: int, size: int) -> np.uint64:
    """The first ``size`` (any; 8 at most are read) bytes from ``start``, as ``masked`` gives them, within bounds."""
    if start + 8 <= len(data):
        return masked(load64(data, start), size)
    word = np.uint64(0)
    for i in range(min(size, 8)):
        word |= np.uint64(data[start + i]) << np.uint64(8 * i)
    return word
