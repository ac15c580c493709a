"""Documents as bytes to token ids, compiled: UTF-8 runs, pieces by ``SPLIT_PATTERN``, a cache of merged pieces.

What ``Tokenizer.encode`` does in three passes of libraries happens here in two over the bytes: ``_run_end`` finds the
next stretch of valid text (and cuts it where ``bounded`` does), ``_encode_run`` splits it and looks every piece up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from refractor_megatron.tokenizer.fast_merge import WIDE, Ids, Longs, Vocabulary, Words, crossable, merge, mix
from refractor_megatron.tokenizer.fast_words import (
    HIGH,
    Bytes,
    leading_letters,
    load64,
    masked,
    signed,
    store64,
    word_at,
)
from refractor_megatron.tokenizer.pieces import LINE_END_REACH, PIECE_CHARS

#: What the split pattern tells apart. Line ends are white space too.
OTHER, LETTER, NUMBER, SPACE, LINE_END = range(5)

#: Longest piece (bytes) and most ids that a cache entry holds.
CACHED_BYTES, CACHED_IDS = 32, 6
#: Words of an entry: four of bytes, one of sizes, three of ids; one line of the processor's cache.
ENTRY_WORDS = 8
#: Longer pieces are searched for places that no token crosses.
_WHOLE_BYTES = 8
_BLANK, _QUOTE, _CR, _LF = 0x20, 0x27, 0x0D, 0x0A


class Tables(NamedTuple):
    """classes: uint8 [0x110000], of every code point. cache: uint64 [entries * ENTRY_WORDS], entries a power of two.

    Two neighbours of the cache share a place: the first keeps what came first, as common pieces do, the second what
    came last.
    """

    vocabulary: Vocabulary
    classes: Bytes
    cache: Words


@njit(cache=True, nogil=True)
def _valid_size(data: Bytes, at: int, end: int) -> int:
    """Bytes of the UTF-8 character at ``at``, 0 where none begins (RFC 3629: shortest form, no surrogates)."""
    a = data[at]
    if a < 0x80:
        return 1
    if a < 0xC2 or a > 0xF4 or at + 1 >= end:
        return 0
    b = data[at + 1]
    if b & 0xC0 != 0x80:
        return 0
    if a < 0xE0:
        return 2
    if at + 2 >= end or data[at + 2] & 0xC0 != 0x80:
        return 0
    if a < 0xF0:
        return 0 if (a == 0xE0 and b < 0xA0) or (a == 0xED and b >= 0xA0) else 3
    if at + 3 >= end or data[at + 3] & 0xC0 != 0x80:
        return 0
    return 0 if (a == 0xF0 and b < 0x90) or (a == 0xF4 and b >= 0x90) else 4


@njit(cache=True, nogil=True)
def _run_end(data: Bytes, start: int, end: int) -> int:
    """End of the valid text that begins at ``start``, at most ``PIECE_CHARS`` long as ``pieces.bounded`` cuts it."""
    at, chars = start, 0
    while at < end:
        if at + 8 <= end and chars + 8 <= PIECE_CHARS and load64(data, at) & HIGH == 0:
            at += 8
            chars += 8
            continue
        size = _valid_size(data, at, end)
        if size == 0:
            break
        if chars == PIECE_CHARS:
            return int(_cut_before(data, at))
        at += size
        chars += 1
    return at


@njit(cache=True, nogil=True)
def _cut_before(data: Bytes, limit: int) -> int:
    """After the last line end in the ``LINE_END_REACH`` characters before ``limit``, else ``limit``."""
    at = limit
    for _ in range(LINE_END_REACH):
        at -= 1
        while data[at] & 0xC0 == 0x80:
            at -= 1
        if data[at] == _LF:
            return at + 1
    return limit


@njit(inline="always")
def _char(data: Bytes, at: int, classes: Bytes) -> tuple[int, int]:
    """Class and size of the character at ``at`` of valid text."""
    a = np.int64(data[at])
    if a < 0x80:
        return classes[a], 1
    b = np.int64(data[at + 1]) & 0x3F
    if a < 0xE0:
        return classes[((a & 0x1F) << 6) | b], 2
    c = np.int64(data[at + 2]) & 0x3F
    if a < 0xF0:
        return classes[((a & 0x0F) << 12) | (b << 6) | c], 3
    return classes[((a & 0x07) << 18) | (b << 12) | (c << 6) | (np.int64(data[at + 3]) & 0x3F)], 4


@njit(inline="always")
def _letters(data: Bytes, at: int, end: int, classes: Bytes) -> int:
    """End of the letters from ``at``."""
    while at + 8 <= end:
        ascii_letters = leading_letters(load64(data, at))
        at += ascii_letters
        if ascii_letters < 8 and data[at] < 0x80:
            return at
        while at < end and data[at] >= 0x80:
            kind, size = _char(data, at, classes)
            if kind != LETTER:
                return at
            at += size
    while at < end:
        kind, size = _char(data, at, classes)
        if kind != LETTER:
            break
        at += size
    return at


@njit(cache=True, nogil=True)
def _numbers(data: Bytes, at: int, end: int, classes: Bytes) -> int:
    """End of up to two more numbers from ``at``."""
    for _ in range(2):
        if at >= end:
            break
        kind, size = _char(data, at, classes)
        if kind != NUMBER:
            break
        at += size
    return at


@njit(cache=True, nogil=True)
def _marks(data: Bytes, at: int, end: int, classes: Bytes) -> int:
    """End of the characters that are neither letter, number nor space from ``at``, and the line ends after them."""
    while at < end:
        kind, size = _char(data, at, classes)
        if kind != OTHER:
            break
        at += size
    while at < end and (data[at] == _CR or data[at] == _LF):
        at += 1
    return at


@njit(cache=True, nogil=True)
def _spaces(data: Bytes, start: int, end: int, classes: Bytes) -> int:
    """End of the piece that begins with the white space at ``start``.

    After the run's last line end if it has one; else before its last character, which the next piece may lead with,
    unless the run is one character or ends the text.
    """
    at, last, line_end = start, start, -1
    while at < end:
        kind, size = _char(data, at, classes)
        if kind == LINE_END:
            line_end = at + 1
        elif kind != SPACE:
            break
        last = at
        at += size
    if line_end >= 0:
        return line_end
    return at if at == end or last == start else last


@njit(cache=True, nogil=True)
def _contraction(data: Bytes, at: int, end: int) -> int:
    """Bytes of the contraction whose quote is at ``at``: 's 'd 'm 't 'll 've 're in one case; 0 if there is none."""
    if at + 1 >= end:
        return 0
    a = data[at + 1]
    low = a | 0x20
    if low == 0x73 or low == 0x64 or low == 0x6D or low == 0x74:
        return 2
    if at + 2 >= end or (low != 0x6C and low != 0x76 and low != 0x72):
        return 0
    second = 0x6C if low == 0x6C else 0x65  # l for 'll, e for 've and 're
    return 3 if data[at + 2] == second ^ ((a & 0x20) ^ 0x20) else 0


@njit(cache=True, nogil=True)
def _piece_end(data: Bytes, at: int, end: int, classes: Bytes) -> int:
    """End of the piece that ``SPLIT_PATTERN`` matches at ``at``; its alternatives in their order."""
    kind, size = _char(data, at, classes)
    after = at + size
    if kind == LETTER:
        return int(_letters(data, after, end, classes))
    if kind == NUMBER:
        return int(_numbers(data, after, end, classes))
    if kind == LINE_END:
        return int(_spaces(data, at, end, classes))
    if data[at] == _QUOTE:
        contraction = _contraction(data, at, end)
        if contraction:
            return at + contraction
    follower, width = OTHER, 0
    if after < end:
        follower, width = _char(data, after, classes)
        if follower == LETTER:
            return int(_letters(data, after + width, end, classes))
    if kind == OTHER or (data[at] == _BLANK and after < end and follower == OTHER):
        return int(_marks(data, after, end, classes))
    return int(_spaces(data, at, end, classes))


@njit(cache=True, nogil=True)
def _part_end(data: Bytes, start: int, stop: int, crossed: Bytes) -> int:
    """End of the first part of a piece of wide characters that merges alone."""
    for at in range(start + 3, stop - 2):
        if data[at] >= WIDE and not crossable(crossed, data, at):
            return at
    return stop


@njit(cache=True, nogil=True)
def _encode_run(data: Bytes, at: int, end: int, tables: Tables, tokens: Ids, ranks: Ids, out: Ids, n: int) -> int:
    """Appends the ids of valid text ``data[at:end]`` to ``out`` from ``n``; returns the new count."""
    classes, cache, crossed = tables.classes, tables.cache, tables.vocabulary.crossed
    mask = np.uint64(len(cache) // (2 * ENTRY_WORDS) - 1)
    safe = len(data) - CACHED_BYTES
    while at < end:
        start = at
        at = _piece_end(data, start, end, classes)
        begin = start
        while begin < at:
            stop = at if at - begin <= _WHOLE_BYTES else _part_end(data, begin, at, crossed)
            size = stop - begin
            part = begin > start or stop < at
            if size > CACHED_BYTES:
                n = _merge_into(tables.vocabulary, data, begin, stop, part, tokens, ranks, out, n)
                begin = stop
                continue
            if begin <= safe:
                w0, w1 = masked(load64(data, begin), size), masked(load64(data, begin + 8), size - 8)
            else:
                w0, w1 = word_at(data, begin, size), word_at(data, begin + 8, size - 8)
            w2 = w3 = np.uint64(0)
            if size > 16:
                w2, w3 = word_at(data, begin + 16, size - 16), word_at(data, begin + 24, size - 24)
            head = np.uint64(size) | (np.uint64(64) if part else np.uint64(0))
            slot = signed(_code(w0, w1, w2, w3, size) & mask) * (2 * ENTRY_WORDS)
            if not _holds(cache, slot, w0, w1, w2, w3, head):
                slot += ENTRY_WORDS
                if not _holds(cache, slot, w0, w1, w2, w3, head):
                    before = n
                    n = _merge_into(tables.vocabulary, data, begin, stop, part, tokens, ranks, out, n)
                    if n - before <= CACHED_IDS:
                        slot -= 0 if cache[slot - 4] else ENTRY_WORDS
                        _keep(cache, slot, w0, w1, w2, w3, head | (np.uint64(n - before) << np.uint64(8)), out, before)
                    begin = stop
                    continue
            store64(out, n, load64(cache, slot + 5))
            store64(out, n + 2, load64(cache, slot + 6))
            store64(out, n + 4, load64(cache, slot + 7))
            n += signed(load64(cache, slot + 4) >> np.uint64(8))
            begin = stop
    return n


@njit(inline="always")
def _holds(
    cache: Words, slot: int, w0: np.uint64, w1: np.uint64, w2: np.uint64, w3: np.uint64, head: np.uint64
) -> bool:
    """Whether the entry at ``slot`` is the piece of these bytes and this head (size, and 64 for a part)."""
    same = (load64(cache, slot) ^ w0) | (load64(cache, slot + 1) ^ w1)
    same |= (load64(cache, slot + 2) ^ w2) | (load64(cache, slot + 3) ^ w3)
    return bool((same | ((load64(cache, slot + 4) & np.uint64(0xFF)) ^ head)) == 0)


@njit(cache=True, nogil=True)
def _keep(
    cache: Words,
    slot: int,
    w0: np.uint64,
    w1: np.uint64,
    w2: np.uint64,
    w3: np.uint64,
    head: np.uint64,
    out: Ids,
    first: int,
) -> None:
    """Enters a piece and its ids, ``CACHED_IDS`` of ``out`` from ``first``, at ``slot``."""
    cache[slot], cache[slot + 1], cache[slot + 2], cache[slot + 3], cache[slot + 4] = w0, w1, w2, w3, head
    for i in range(CACHED_IDS // 2):
        cache[slot + 5 + i] = load64(out, first + 2 * i)


@njit(cache=True, nogil=True)
def seed(tables: Tables, out: Ids) -> None:
    """Enters the tokens into the empty cache, as pieces that are one id. ``out``: zeros [``CACHED_IDS``]."""
    blob, bounds, cache = tables.vocabulary.blob, tables.vocabulary.bounds, tables.cache
    mask = np.uint64(len(cache) // (2 * ENTRY_WORDS) - 1)
    for token in range(len(bounds) - 1):
        begin, size = bounds[token], bounds[token + 1] - bounds[token]
        if size <= CACHED_BYTES:
            w0, w1 = word_at(blob, begin, size), word_at(blob, begin + 8, size - 8)
            w2, w3 = word_at(blob, begin + 16, size - 16), word_at(blob, begin + 24, size - 24)
            slot = signed(_code(w0, w1, w2, w3, size) & mask) * (2 * ENTRY_WORDS)
            slot += ENTRY_WORDS if cache[slot + 4] else 0
            out[0] = token
            _keep(cache, slot, w0, w1, w2, w3, np.uint64(size) | np.uint64(256), out, 0)


@njit(inline="always")
def _code(w0: np.uint64, w1: np.uint64, w2: np.uint64, w3: np.uint64, size: int) -> np.uint64:
    """Hash of a piece."""
    code = mix(w0, w1)
    return mix(code ^ w2, w3) if size > 16 else code


@njit(cache=True, nogil=True)
def _merge_into(
    vocabulary: Vocabulary, data: Bytes, start: int, stop: int, part: bool, tokens: Ids, ranks: Ids, out: Ids, n: int
) -> int:
    """Appends the ids of one piece, or part of one, to ``out`` from ``n``; returns the new count."""
    count = merge(vocabulary, data, start, stop, part, tokens, ranks)
    for i in range(count):
        out[n + i] = tokens[i]
    return n + count


@njit(cache=True, nogil=True)
def encode_documents(data: Bytes, offsets: Longs, tables: Tables, scratch: Ids, out: Ids, starts: Longs) -> int:
    """Ids of documents ``data[offsets[i]:offsets[i + 1]]`` into ``out``, their first places into ``starts`` [n + 1].

    scratch: int32 [2, longest piece in bytes]. out: ``CACHED_IDS`` longer than the documents have bytes. Returns the
    number of ids.
    """
    n = 0
    starts[0] = 0
    for document in range(len(offsets) - 1):
        at, end = offsets[document], offsets[document + 1]
        while at < end:
            stop = _run_end(data, at, end)
            if stop == at:
                out[n] = tables.vocabulary.byte_id[data[at]]
                n += 1
                at += 1
                continue
            n = _encode_run(data, at, stop, tables, scratch[0], scratch[1], out, n)
            at = stop
        starts[document + 1] = n
    return n
