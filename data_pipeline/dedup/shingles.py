"""Documents as sets of hashed word n-grams, straight from UTF-8 bytes: no string is made.

The normaliser ``words-lower/1``. A word is a run of word characters, lower-cased; everything else separates.

* ASCII: letters, digits and ``_`` are word characters.
* Beyond ASCII every character is one, except the spaces, punctuation and symbols of ``_SEPARATORS``, emoji, and bytes
  that are no UTF-8. Lower-cased are Latin, Greek, Cyrillic and Armenian; a final sigma counts as a sigma, full-width
  letters and digits as ASCII. Composed and decomposed accents stay different.
* Scripts written without spaces (``_UNSPACED``: Han, kana, Thai, Lao, Khmer, Burmese and so on): each character is a
  word.

A document of more such characters than words takes n-grams of ``characters_for(n)`` characters, about as much text as
n words. A document of fewer words than n has one shingle, of all its words and their number; one without any word has
one of its raw bytes. So short documents are near only if equal, instead of sharing the signature of the empty set.

A word is hashed by FNV-1a over its code points, finished by MurmurHash3's 64-bit mixer; an n-gram by a polynomial
over its words' hashes modulo 2^64, mixed again. Equal n-grams have equal hashes; among 10^7 distinct ones some two
are equal with probability 3e-6.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import int64, njit, uint32, uint64

#: Raised when any text gives other shingles; stated in every signature file.
NORMALISER = "words-lower/1"
#: How words and n-grams are hashed; stated in every signature file.
HASH = "fnv1a-fmix64/1"

_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x2FDF),  # Han radicals
    (0x3005, 0x3007),  # Han repetition, closing and zero marks
    (0x3040, 0x312F),  # kana, bopomofo
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0xA4CF),  # Han, Yi
    (0xA980, 0xA9FF),  # Javanese, Burmese
    (0xAA60, 0xAA7F),  # Burmese
    (0xF900, 0xFAFF),  # Han
    (0xFF66, 0xFF9F),  # half-width kana
)
_SEPARATORS = (
    (0x0080, 0x00A9),
    (0x00AB, 0x00B1),
    (0x00B4, 0x00B4),
    (0x00B6, 0x00B8),
    (0x00BB, 0x00BB),
    (0x00BF, 0x00BF),
    (0x00D7, 0x00D7),
    (0x00F7, 0x00F7),
    (0x037E, 0x037E),  # Greek
    (0x0387, 0x0387),
    (0x055A, 0x055F),  # Armenian
    (0x0589, 0x058A),
    (0x05BE, 0x05BE),  # Hebrew
    (0x05C0, 0x05C0),
    (0x05C3, 0x05C3),
    (0x05C6, 0x05C6),
    (0x05F3, 0x05F4),
    (0x060C, 0x060D),  # Arabic
    (0x061B, 0x061F),
    (0x066A, 0x066D),
    (0x06D4, 0x06D4),
    (0x0700, 0x070D),  # Syriac
    (0x0964, 0x0965),  # danda
    (0x0970, 0x0970),
    (0x0E4F, 0x0E4F),  # Thai
    (0x0E5A, 0x0E5B),
    (0x0F04, 0x0F14),  # Tibetan, so that its syllables are words
    (0x0F3A, 0x0F3D),
    (0x104A, 0x104F),  # Burmese
    (0x10FB, 0x10FB),
    (0x1361, 0x1368),  # Ethiopic
    (0x1680, 0x1680),
    (0x17D4, 0x17DA),  # Khmer
    (0x1800, 0x180A),  # Mongolian
    (0x2000, 0x206F),
    (0x207D, 0x207E),
    (0x208D, 0x208E),
    (0x20A0, 0x20CF),
    (0x2190, 0x2BFF),
    (0x2E00, 0x2E7F),
    (0x3000, 0x3004),
    (0x3008, 0x303F),
    (0x30A0, 0x30A0),
    (0x30FB, 0x30FB),
    (0xFD3E, 0xFD3F),
    (0xFE10, 0xFE1F),
    (0xFE30, 0xFE6F),
    (0xFEFF, 0xFEFF),
    (0xFF00, 0xFF0F),
    (0xFF1A, 0xFF20),
    (0xFF3B, 0xFF40),
    (0xFF5B, 0xFF65),
    (0xFFE0, 0xFFFF),
)
_LOWERED = ((0x0080, 0x058F), (0x1E00, 0x1FFF))
_UNSPACED_BIT = 1 << 31

_WORD_SEED = np.uint64(0xCBF29CE484222325)
_WORD_PRIME = np.uint64(0x100000001B3)
_GRAM_PRIME = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)


def _table() -> npt.NDArray[np.uint32]:
    """For each code point below 2^16: 0 for a separator, else its lower case, ``_UNSPACED_BIT`` set if unspaced."""
    table = np.arange(1 << 16, dtype=np.uint32)
    for code in range(0x80):
        table[code] = ord(chr(code).lower()) if chr(code).isalnum() or chr(code) == "_" else 0
    for first, last in _LOWERED:
        for code in range(first, last + 1):
            lower = chr(code).lower()
            table[code] = ord(lower) if len(lower) == 1 else code
    table[0x03C2] = 0x03C3  # final sigma
    table[0xFF10:0xFF1A] = np.arange(ord("0"), ord("9") + 1)
    for first in (0xFF21, 0xFF41):
        table[first : first + 26] = np.arange(ord("a"), ord("z") + 1)
    for first, last in _UNSPACED:
        table[first : last + 1] |= np.uint32(_UNSPACED_BIT)
    for first, last in _SEPARATORS:
        table[first : last + 1] = 0
    return table


TABLE = _table()


def characters_for(ngram: int) -> int:
    """Characters of an unspaced script that stand for ``ngram`` words."""
    return ngram * 5 // 2


@njit(inline="always")
def _mix(x):  # type: ignore[no-untyped-def]
    """MurmurHash3's 64-bit finaliser."""
    x ^= x >> uint64(33)
    x *= _MIX_1
    x ^= x >> uint64(33)
    x *= _MIX_2
    return x ^ (x >> uint64(33))


@njit(inline="always")
def _decode(flat, at, end):  # type: ignore[no-untyped-def]
    """Code point and length of the sequence of two or more bytes at ``at``; (0, 1) where it is no valid UTF-8."""
    lead = uint32(flat[at])
    if lead < uint32(0xC2) or lead > uint32(0xF4):
        return uint32(0), 1
    length = 2 if lead < uint32(0xE0) else (3 if lead < uint32(0xF0) else 4)
    if at + length > end:
        return uint32(0), 1
    code = lead & (uint32(0x1F) if length == 2 else (uint32(0x0F) if length == 3 else uint32(0x07)))
    for k in range(1, length):
        byte = uint32(flat[at + k])
        if byte & uint32(0xC0) != uint32(0x80):
            return uint32(0), 1
        code = uint32(code << uint32(6)) | (byte & uint32(0x3F))
    if length == 3 and (code < uint32(0x800) or uint32(0xD800) <= code < uint32(0xE000)):
        return uint32(0), 1
    if length == 4 and (code < uint32(0x10000) or code > uint32(0x10FFFF)):
        return uint32(0), 1
    return code, length


@njit(inline="always")
def _kind(code, table):  # type: ignore[no-untyped-def]
    """``table``'s entry, continued above 2^16: Han is unspaced, emoji and unassigned planes separate."""
    if code < uint32(0x10000):
        return table[code]
    if uint32(0x20000) <= code < uint32(0x40000):
        return uint32(code | uint32(_UNSPACED_BIT))
    if uint32(0x1F000) <= code:
        return uint32(0)
    return code


@njit(cache=True, nogil=True)
def _words(flat, start, end, table, words):  # type: ignore[no-untyped-def]
    """Hashes the words of flat[start:end] into ``words``; returns their number and how many are single characters.

    Where a word ends cannot be predicted, so that costs no branch: the state is stored at every character, and counts
    once its word has ended; a mask resets it. Unsigned places spare the test for negative ones.
    """
    count, single = uint64(0), 0
    state, inside = _WORD_SEED, uint64(0)
    at = start
    while at < end:
        byte = flat[uint64(at)]
        if byte < 0x80:
            kind = table[byte]
            at += 1
        else:
            code, length = _decode(flat, at, end)
            kind = _kind(code, table) if code else uint32(0)
            at += length
            if kind & uint32(_UNSPACED_BIT):
                words[count] = state
                count += inside
                words[count] = (_WORD_SEED ^ uint64(kind)) * _WORD_PRIME
                count += uint64(1)
                single += 1
                state, inside = _WORD_SEED, uint64(0)
                continue
        words[count] = state
        goes_on = uint64(kind != uint32(0))
        count += inside & ~goes_on
        state = _WORD_SEED ^ (((state ^ uint64(kind)) * _WORD_PRIME ^ _WORD_SEED) & (uint64(0) - goes_on))
        inside = goes_on
    words[count] = state
    count += inside
    for i in range(count):
        words[i] = _mix(words[i])
    return int64(count), single


@njit(cache=True, nogil=True)
def _shingle(flat, offsets, chosen, table, ngram, characters, words, out, starts):  # type: ignore[no-untyped-def]
    """Fills ``out`` and ``starts``; ``words`` is room for the words of the longest document."""
    at = 0
    for i in range(chosen.shape[0]):
        start, end = offsets[chosen[i]], offsets[chosen[i] + 1]
        starts[i] = at
        count, single = _words(flat, start, end, table, words)
        n = characters if 2 * single > count else ngram
        if count < n:
            state = uint64(count)  # the raw bytes of a document without words
            if count == 0:
                for k in range(start, end):
                    state = (state ^ uint64(flat[k])) * _WORD_PRIME
            for k in range(count):
                state = state * _GRAM_PRIME + words[k]
            out[at] = _mix(state ^ _WORD_SEED)
            at += 1
            continue
        state = uint64(0)
        leaving = uint64(1)  # _GRAM_PRIME ** n: what a word weighs when it leaves the window
        for k in range(n):
            state = state * _GRAM_PRIME + words[k]
            leaving *= _GRAM_PRIME
        out[at] = _mix(state)
        for k in range(count - n):
            state = state * _GRAM_PRIME + (words[k + n] - words[k] * leaving)
            out[at + k + 1] = _mix(state)
        at += count - n + 1
    starts[chosen.shape[0]] = at


def shingle(
    flat: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    ngram: int = 5,
    rows: npt.NDArray[np.int64] | None = None,
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Hashed word n-grams of documents flat[offsets[i]:offsets[i + 1]], all of them or those of ``rows``.

    Returns ``(hashes, starts)``: uint64, in the order of the text and with repetitions, and int64 [documents + 1];
    document i has hashes[starts[i]:starts[i + 1]], never none. ``ngram`` >= 1.
    """
    assert ngram >= 1 and flat.dtype == np.uint8 and offsets.dtype == np.int64
    chosen = np.arange(len(offsets) - 1) if rows is None else np.ascontiguousarray(rows, dtype=np.int64)
    sizes = np.diff(offsets)[chosen]
    # a word and its separator take two bytes, an unspaced character three; one place more is written to at the end
    words = np.empty(int(sizes.max(initial=0)) // 2 + 2, dtype=np.uint64)
    out = np.empty(int(sizes.sum()) // 2 + 2 * len(chosen) + 1, dtype=np.uint64)
    starts = np.empty(len(chosen) + 1, dtype=np.int64)
    _shingle(flat, offsets, chosen, TABLE, ngram, characters_for(ngram), words, out, starts)
    return out[: starts[-1]], starts
