"""Byte-pair merging over numpy tables: the vocabulary by bytes, the pairs that merge, one piece to its ids.

A piece that is a token as a whole is that token, else the leftmost pair of least rank merges until none does (Sennrich
et al., 2016, in tiktoken's form: two neighbours merge when their bytes together are a token, however it was learnt).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from refractor_megatron.tokenizer.fast_words import Bytes, signed, word_at

Ids = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Number = int | np.integer[Any]

#: Ids are packed three to a word.
ID_BITS = 21
_ID_MASK = np.uint64((1 << ID_BITS) - 1)
_FREE = np.uint64(0xFFFFFFFFFFFFFFFF)
_NO_RANK = np.int32(0x7FFFFFFF)
#: First bytes of characters of three or four bytes are at least this.
WIDE = 0xE0
#: Pieces of more bytes keep their pairs in a heap; below, a scan for the least is faster.
_SCAN_BYTES = 64

_K0 = np.uint64(0x9E3779B97F4A7C15)
_K1 = np.uint64(0xC2B2AE3D27D4EB4F)
_K2 = np.uint64(0xFF51AFD7ED558CCD)


class Vocabulary(NamedTuple):
    """Tables of one vocabulary of n tokens.

    blob, bounds: bytes of every token, int64 [n + 1].
    slots: int32 [power of two], token of a hash or -1.
    pairs: uint64 [power of two], (left, right, merged) packed.
    byte_id: int32 [256], id of a byte.
    first: int32 [65536], id of two bytes (first * 256 + second), or -1.
    crossed: uint8 [power of two], see ``crossable``.
    maybe: uint8 [power of two], bits of the hashes in ``pairs``: most neighbours do not merge, and this much smaller
    table says so.
    whole: bool [1], whether some token is reached by no merges, so that pieces must be looked up.
    """

    blob: Bytes
    bounds: Longs
    slots: Ids
    pairs: Words
    byte_id: Ids
    first: Ids
    crossed: Bytes
    maybe: Bytes
    whole: npt.NDArray[np.bool_]


@njit(inline="always")
def mix(a: np.uint64, b: np.uint64) -> np.uint64:
    """A well spread word of two."""
    h = (a ^ (b * _K1)) * _K0
    h = (h ^ (h >> np.uint64(32))) * _K2
    return h ^ (h >> np.uint64(29))


@njit(cache=True, nogil=True)
def hash_bytes(data: Bytes, start: int, stop: int) -> np.uint64:
    """Hash of ``data[start:stop]``."""
    h = np.uint64(stop - start)
    for i in range(start, stop, 8):
        h = mix(h, word_at(data, i, stop - i))
    return h


@njit(cache=True, nogil=True)
def find_token(vocabulary: Vocabulary, data: Bytes, start: int, stop: int) -> int:
    """Id of the token whose bytes are ``data[start:stop]``, or -1."""
    mask = len(vocabulary.slots) - 1
    at = np.int64(hash_bytes(data, start, stop) & np.uint64(mask))
    while True:
        token = vocabulary.slots[at]
        if token < 0:
            return -1
        begin = vocabulary.bounds[token]
        if vocabulary.bounds[token + 1] - begin == stop - start:
            same = True
            for i in range(stop - start):
                if vocabulary.blob[begin + i] != data[start + i]:
                    same = False
                    break
            if same:
                return int(token)
        at = (at + 1) & mask


@njit(cache=True, nogil=True)
def fill_slots(vocabulary: Vocabulary) -> None:
    """Enters every token into ``slots``, which must be -1."""
    mask = len(vocabulary.slots) - 1
    for token in range(len(vocabulary.bounds) - 1):
        code = hash_bytes(vocabulary.blob, vocabulary.bounds[token], vocabulary.bounds[token + 1])
        at = np.int64(code & np.uint64(mask))
        while vocabulary.slots[at] >= 0:
            at = (at + 1) & mask
        vocabulary.slots[at] = token


@njit(cache=True, nogil=True)
def list_pairs(vocabulary: Vocabulary, out: Words) -> int:
    """Every (left, right, merged) of which the bytes of left and right make merged, packed into ``out``; their number.

    With an empty ``out`` it only counts.
    """
    count = 0
    for token in range(len(vocabulary.bounds) - 1):
        begin, end = vocabulary.bounds[token], vocabulary.bounds[token + 1]
        for cut in range(begin + 1, end):
            left = find_token(vocabulary, vocabulary.blob, begin, cut)
            if left < 0:
                continue
            right = find_token(vocabulary, vocabulary.blob, cut, end)
            if right < 0:
                continue
            if len(out):
                out[count] = _packed(left, right) | np.uint64(token)
            count += 1
    return count


@njit(inline="always")
def _packed(left: Number, right: Number) -> np.uint64:
    return (np.uint64(left) << np.uint64(2 * ID_BITS)) | (np.uint64(right) << np.uint64(ID_BITS))


@njit(inline="always")
def _byte_of(maybe: Bytes, code: np.uint64) -> int:
    return signed((code >> np.uint64(32)) & np.uint64(len(maybe) - 1))


@njit(inline="always")
def _bit_of(code: np.uint64) -> np.uint8:
    return np.uint8(np.uint64(1) << (code >> np.uint64(61)))


@njit(cache=True, nogil=True)
def fill_pairs(vocabulary: Vocabulary, found: Words) -> None:
    """Enters what ``list_pairs`` found into ``pairs``, which must be all ones, and ``first``, which must be -1."""
    mask = len(vocabulary.pairs) - 1
    for i in range(len(found)):
        key = found[i] & ~_ID_MASK
        code = mix(key, np.uint64(0))
        vocabulary.maybe[_byte_of(vocabulary.maybe, code)] |= _bit_of(code)
        at = np.int64(code & np.uint64(mask))
        while vocabulary.pairs[at] != _FREE:
            at = (at + 1) & mask
        vocabulary.pairs[at] = found[i]
        token = np.int64(found[i] & _ID_MASK)
        begin = vocabulary.bounds[token]
        if vocabulary.bounds[token + 1] - begin == 2:
            vocabulary.first[np.int64(vocabulary.blob[begin]) * 256 + vocabulary.blob[begin + 1]] = token


@njit(inline="always")
def _context(data: Bytes, at: int, before: int, after: int, mask: int) -> int:
    """Place in ``crossed`` of the bytes around ``at``."""
    word = (np.uint64(before) << np.uint64(56)) | (np.uint64(after) << np.uint64(48))
    for i in range(at - before, at + after):
        word = (word << np.uint64(8)) | np.uint64(data[i])
    return signed(mix(word, np.uint64(0)) & np.uint64(mask))


@njit(cache=True, nogil=True)
def fill_crossed(vocabulary: Vocabulary) -> None:
    """Marks in ``crossed`` the surroundings of every place within a token where a three- or four-byte character begins.

    Up to two bytes before and three after; where a token has fewer, the mark is wider: one byte.
    """
    mask = len(vocabulary.crossed) - 1
    for token in range(len(vocabulary.bounds) - 1):
        begin, end = vocabulary.bounds[token], vocabulary.bounds[token + 1]
        for at in range(begin + 1, end):
            if vocabulary.blob[at] >= WIDE:
                before, after = 2 if at - begin >= 2 else 1, 3 if end - at >= 3 else 1
                vocabulary.crossed[_context(vocabulary.blob, at, before, after, mask)] = 1


@njit(inline="always")
def crossable(crossed: Bytes, data: Bytes, at: int) -> bool:
    """Whether a token might reach over ``at``, where a three- or four-byte character begins.

    Where none does, no merge does, so the bytes before and after it merge as if alone. Needs two bytes before ``at``
    and three after.
    """
    mask = len(crossed) - 1
    return bool(
        crossed[_context(data, at, 2, 3, mask)]
        or crossed[_context(data, at, 1, 3, mask)]
        or crossed[_context(data, at, 2, 1, mask)]
        or crossed[_context(data, at, 1, 1, mask)]
    )


@njit(inline="always")
def _merged(vocabulary: Vocabulary, left: Number, right: Number) -> np.int32:
    """Id of what two neighbours merge into, which is its rank, or ``_NO_RANK``."""
    key = _packed(left, right)
    code = mix(key, np.uint64(0))
    if vocabulary.maybe[_byte_of(vocabulary.maybe, code)] & _bit_of(code) == 0:
        return _NO_RANK
    pairs = vocabulary.pairs
    mask = len(pairs) - 1
    at = np.int64(code & np.uint64(mask))
    while True:
        entry = pairs[at]
        if entry & ~_ID_MASK == key:
            return np.int32(entry & _ID_MASK)
        if entry == _FREE:
            return _NO_RANK
        at = (at + 1) & mask


@njit(inline="always")
def _begin(vocabulary: Vocabulary, data: Bytes, start: int, stop: int, tokens: Ids, ranks: Ids) -> None:
    """Bytes as tokens, and the rank of each with its right neighbour."""
    for i in range(stop - start - 1):
        tokens[i] = vocabulary.byte_id[data[start + i]]
        rank = vocabulary.first[np.int64(data[start + i]) * 256 + data[start + i + 1]]
        ranks[i] = rank if rank >= 0 else _NO_RANK
    tokens[stop - start - 1] = vocabulary.byte_id[data[stop - 1]]
    ranks[stop - start - 1] = _NO_RANK


@njit(cache=True, nogil=True)
def _merge_by_scan(vocabulary: Vocabulary, tokens: Ids, ranks: Ids, count: int) -> int:
    """Merges ``tokens[:count]`` in place; returns how many are left."""
    while True:
        best, at = _NO_RANK, 0
        for i in range(count - 1):
            if ranks[i] < best:
                best, at = ranks[i], i
        if best == _NO_RANK:
            return count
        count -= 1
        tokens[at] = best
        for i in range(at + 1, count):
            tokens[i] = tokens[i + 1]
            ranks[i] = ranks[i + 1]
        ranks[at] = _merged(vocabulary, best, tokens[at + 1]) if at + 1 < count else _NO_RANK
        if at:
            ranks[at - 1] = _merged(vocabulary, tokens[at - 1], best)


@njit(cache=True, nogil=True)
def _push(heap: Longs, size: int, item: Number) -> int:
    at = size
    while at and heap[(at - 1) >> 1] > item:
        heap[at] = heap[(at - 1) >> 1]
        at = (at - 1) >> 1
    heap[at] = item
    return size + 1


@njit(cache=True, nogil=True)
def _pop(heap: Longs, size: int) -> int:
    """Takes the least item from the top; the heap then holds ``size - 1``."""
    size -= 1
    item = heap[size]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= item:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = item
    return size


@njit(cache=True, nogil=True)
def _merge_by_heap(vocabulary: Vocabulary, tokens: Ids, ranks: Ids, count: int) -> int:
    """As ``_merge_by_scan`` in n log n: a heap of (rank, place), outdated entries skipped when they surface."""
    after, before = np.arange(1, count + 1), np.arange(-1, count - 1)
    heap = np.empty(3 * count, dtype=np.int64)
    size = 0
    for i in range(count - 1):
        if ranks[i] != _NO_RANK:
            size = _push(heap, size, (np.int64(ranks[i]) << 32) | i)
    while size:
        top = heap[0]
        size = _pop(heap, size)
        best, at = np.int32(top >> 32), top & 0xFFFFFFFF
        if ranks[at] != best:  # merged away or changed since
            continue
        gone = after[at]
        tokens[at], ranks[gone] = best, _NO_RANK
        after[at] = after[gone]
        ranks[at] = _NO_RANK
        if after[at] < count:
            before[after[at]] = at
            ranks[at] = _merged(vocabulary, best, tokens[after[at]])
            if ranks[at] != _NO_RANK:
                size = _push(heap, size, (np.int64(ranks[at]) << 32) | at)
        if before[at] >= 0:
            left = before[at]
            ranks[left] = _merged(vocabulary, tokens[left], best)
            if ranks[left] != _NO_RANK:
                size = _push(heap, size, (np.int64(ranks[left]) << 32) | left)
    left_over, at = 0, 0
    while at < count:
        tokens[left_over] = tokens[at]
        left_over += 1
        at = after[at]
    return left_over


@njit(cache=True, nogil=True)
def merge(vocabulary: Vocabulary, data: Bytes, start: int, stop: int, part: bool, tokens: Ids, ranks: Ids) -> int:
    """Ids of the piece ``data[start:stop]`` into ``tokens``; their number. ``ranks`` is scratch, both as long as it.

    ``part``: not a whole piece, so only merges make it a token.
    """
    whole = -1 if part or not vocabulary.whole[0] else find_token(vocabulary, data, start, stop)
    if whole >= 0:
        tokens[0] = whole
        return 1
    _begin(vocabulary, data, start, stop, tokens, ranks)
    count = stop - start
    if count <= _SCAN_BYTES:
        return int(_merge_by_scan(vocabulary, tokens, ranks, count))
    return int(_merge_by_heap(vocabulary, tokens, ranks, count))


@njit(cache=True, nogil=True)
def all_reached(vocabulary: Vocabulary, tokens: Ids, ranks: Ids) -> bool:
    """Whether merging the bytes of any token gives that token."""
    for token in range(len(vocabulary.bounds) - 1):
        begin, end = vocabulary.bounds[token], vocabulary.bounds[token + 1]
        if merge(vocabulary, vocabulary.blob, begin, end, True, tokens, ranks) != 1:
            return False
    return True
