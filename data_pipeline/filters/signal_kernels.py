"""The numeric signals of a document, in compiled passes over its bytes: characters to tokens, tokens to lines, n-grams.

Token: a run of characters that are not white space. Its code is a 64-bit hash of its letters and digits, ASCII capitals
lowered (of all its characters where it has none), so that punctuation and case at its edge do not hide a repetition.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from data_pipeline.filters.characters import BULLET, DENSE, END, LETTER, LONG, NUMBER, QUOTE, SPACE
from data_pipeline.filters.signals import DENSE_WORD, LONG_WORD, SHORT_LINE, SIGNALS

_SEED = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x100000001B3)
_BASE = np.uint64(0x9E3779B97F4A7C15)
_ZERO, _ONE, _CASE = np.uint64(0), np.uint64(1), np.uint64(32)
_MIX_1, _MIX_2, _HALF = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53), np.uint64(33)
_ELLIPSIS = 128  # in a token's last flags, where BULLET means nothing
_MASK64 = (1 << 64) - 1
# places in the tally of a document
_CHARS, _ALNUM, _DENSE, _LONG, _HASH, _DOTS, _NEWLINES, _SENTENCES, _CURLY = range(9)
_TOKENS, _WORDS, _WORD_CHARS, _ALPHABETIC, _LOREM, _LINES, _BULLETS, _TRAILS = range(9, 17)
_TERMINAL, _SHORT, _SCRIPT, _POLICY, _PARAGRAPHS, _COUNT = range(17, 23)


def word_code(word: str) -> int:
    """The code that the kernels give a token of this word (letters and digits, lower case)."""
    code = int(_SEED)
    for character in word:
        code = (code ^ ord(character)) * int(_PRIME) & _MASK64
    code = (code ^ code >> 33) * int(_MIX_1) & _MASK64
    code = (code ^ code >> 33) * int(_MIX_2) & _MASK64
    return code ^ code >> 33


_LOREM_WORD, _IPSUM, _JAVASCRIPT = (np.uint64(word_code(word)) for word in ("lorem", "ipsum", "javascript"))
_PRIVACY, _COOKIE, _POLICY_WORD = (np.uint64(word_code(word)) for word in ("privacy", "cookie", "policy"))
_TERMS, _OF, _USE = (np.uint64(word_code(word)) for word in ("terms", "of", "use"))
_USES, _COOKIES = (np.uint64(word_code(word)) for word in ("uses", "cookies"))


@njit(cache=True, nogil=True, inline="always")
def _mix(x):  # type: ignore[no-untyped-def]
    """Finaliser of MurmurHash3 (Appleby)."""
    x = (x ^ (x >> _HALF)) * _MIX_1
    x = (x ^ (x >> _HALF)) * _MIX_2
    return x ^ (x >> _HALF)


@njit(cache=True, nogil=True, inline="always")
def _decode(text, i, n):  # type: ignore[no-untyped-def]
    """Code point at byte ``i`` >= 0x80 and its bytes; (0, 1) for a byte that begins no character."""
    c = np.int64(text[i])
    if 0xC2 <= c < 0xE0 and i + 1 < n:
        return (c & 0x1F) << 6 | (np.int64(text[i + 1]) & 0x3F), 2
    if 0xE0 <= c < 0xF0 and i + 2 < n:
        return (c & 0x0F) << 12 | (np.int64(text[i + 1]) & 0x3F) << 6 | (np.int64(text[i + 2]) & 0x3F), 3
    if 0xF0 <= c <= 0xF4 and i + 3 < n:
        high = (c & 0x07) << 18 | (np.int64(text[i + 1]) & 0x3F) << 12
        if high < 0x110000:
            return high | (np.int64(text[i + 2]) & 0x3F) << 6 | (np.int64(text[i + 3]) & 0x3F), 4
    return np.int64(0), 1


@njit(cache=True, nogil=True)
def _tokens(text, flags, code, raw, size, letters, kind, first, last, tally):  # type: ignore[no-untyped-def]
    """Tokens of a text into the arrays, a line end as one of size 0; counts characters. Returns how many."""
    n, i, count = text.shape[0], 0, 0
    dense = long = hashes = ellipses = curly = sentences = 0  # of the text; in registers, not in the tally
    dots = pending = 0  # dots in a row; sentence mark just read: 1 ASCII, 2 other
    length = alnum = 0  # of the token; then its flags: all, of its first character, of its last
    seen = head = tail = np.int64(0)
    h, r = _SEED, _SEED
    while True:
        point, step = np.int64(32), 1  # the end counts as a space
        if i < n:
            point = np.int64(text[i])
            if point >= 0x80:
                point, step = _decode(text, i, n)
        f = np.int64(flags[point])
        if pending and not f & END:
            sentences += pending == 2 or not f & (LETTER | NUMBER)
            pending = 0
        if f & SPACE:
            if length:
                code[count] = _mix(h if alnum else r)
                raw[count] = _mix(r)
                size[count], letters[count] = length, alnum
                kind[count], first[count], last[count] = seen, head, tail
                count += 1
                dots = length = alnum = 0
                seen = np.int64(0)
                h, r = _SEED, _SEED
            if i >= n:
                break
            if point == 10:
                size[count], code[count] = 0, _ZERO
                count += 1
            i += step
            continue
        wide = np.uint64(point)
        r = (r ^ wide) * _PRIME
        tail = f & 127
        if f & (LETTER | NUMBER):
            h = (h ^ (wide + _CASE if 65 <= point <= 90 else wide)) * _PRIME
            alnum += 1
            dots = 0
            if f & (DENSE | LONG):
                dense += 1 if f & DENSE else 0
                long += 1 if f & LONG else 0
        else:
            if f & END:
                pending = 1 if point < 0x80 else 2
            dots = dots + 1 if point == 46 else 0
            ellipses += 1 if point == 0x2026 or (dots > 0 and dots % 3 == 0) else 0
            tail |= _ELLIPSIS if point == 0x2026 or dots >= 3 else 0
            hashes += 1 if point == 35 else 0
            curly += 1 if point == 123 else 0
        if length == 0:
            head = f
        seen |= f
        length += 1
        i += step
    tally[_DENSE], tally[_LONG], tally[_HASH], tally[_DOTS] = dense, long, hashes, ellipses
    tally[_CURLY], tally[_SENTENCES] = curly, sentences
    return count


@njit(cache=True, nogil=True)
def _phrase(code, start, at):  # type: ignore[no-untyped-def]
    """What ends at token ``at`` of a line that begins at ``start``: 1 "javascript", 2 policy phrase, 4 lorem ipsum."""
    now = code[at]
    if now == _JAVASCRIPT:
        return 1
    if at == start:
        return 0
    before = code[at - 1]
    if now == _IPSUM:
        return 4 if before == _LOREM_WORD else 0
    if now == _POLICY_WORD:
        return 2 if before == _PRIVACY or before == _COOKIE else 0  # noqa: SIM109 (numba has no fast "in")
    if now == _COOKIES and (before == _USE or before == _USES):  # noqa: SIM109
        return 2
    earlier = code[at - 2] if at - 2 >= start else _ZERO
    found = now == _COOKIES and before == _OF and earlier == _USE
    return 2 if found or (now == _USE and before == _OF and earlier == _TERMS) else 0


@njit(cache=True, nogil=True)
def _line(head, tail, length, phrases, tally):  # type: ignore[no-untyped-def]
    """Counts a line that has text."""
    tally[_LINES] += 1
    tally[_BULLETS] += head & BULLET != 0
    tally[_TRAILS] += tail & _ELLIPSIS != 0
    tally[_TERMINAL] += tail & (END | QUOTE) != 0
    tally[_SHORT] += length <= SHORT_LINE
    tally[_SCRIPT] += phrases & 1
    tally[_POLICY] += phrases & 2 != 0
    tally[_LOREM] += phrases & 4 != 0


@njit(cache=True, nogil=True)
def _words(count, code, size, letters, kind, tally):  # type: ignore[no-untyped-def]
    """Counts tokens and moves them together, without the line ends; returns how many."""
    tokens = words = characters = alphabetic = newlines = total = alnum = 0
    for k in range(count):
        newlines += size[k] == 0
        if size[k]:
            total += size[k]
            alnum += letters[k]
            alphabetic += kind[k] & LETTER
            if letters[k] and not kind[k] & (DENSE | LONG):
                words += 1
                characters += letters[k]
            code[tokens], size[tokens] = code[k], size[k]
            tokens += 1
    tally[_TOKENS], tally[_WORDS], tally[_WORD_CHARS], tally[_ALPHABETIC] = tokens, words, characters, alphabetic
    tally[_NEWLINES], tally[_CHARS], tally[_ALNUM] = newlines, total, alnum
    return tokens


@njit(cache=True, nogil=True)
def _lines(count, code, raw, size, first, last, line, line_size, paragraph, paragraph_size, tally):  # type: ignore[no-untyped-def]
    """Hashes and characters of the lines with text and of the paragraphs, from tokens."""
    start = phrases = chars = lines = paragraphs = paragraph_chars = 0  # of the line: where it starts, ...
    line_hash, paragraph_hash = _SEED, _SEED
    for k in range(count + 1):
        if k < count and size[k]:
            chars += size[k]
            line_hash = (line_hash ^ raw[k]) * _BASE
            c = code[k]
            if c == _JAVASCRIPT or c == _IPSUM or c == _POLICY_WORD or c == _COOKIES or c == _USE:  # noqa: SIM109
                phrases |= _phrase(code, start, k)
            continue
        if chars:  # end of a line with text
            line[lines], line_size[lines] = _mix(line_hash), chars
            paragraph_hash = (paragraph_hash ^ line[lines]) * _BASE
            lines += 1
            paragraph_chars += chars
            _line(first[start], last[k - 1], chars + k - start - 1, phrases, tally)
        if paragraph_chars and (chars == 0 or k == count):  # a blank line, or the end
            paragraph[paragraphs], paragraph_size[paragraphs] = _mix(paragraph_hash), paragraph_chars
            paragraphs += 1
            paragraph_chars, paragraph_hash = 0, _SEED
        start, chars, phrases, line_hash = k + 1, 0, 0, _SEED
    tally[_PARAGRAPHS] = paragraphs


@njit(cache=True, nogil=True, inline="always")
def _slot(key, mask, epoch, keys, stamps):  # type: ignore[no-untyped-def]
    """Where ``key`` lies, or is to lie, in the open table; a slot of an older ``epoch`` is free."""
    at = key & mask
    while stamps[at] == epoch and keys[at] != key:
        at = (at + _ONE) & mask
    return at


@njit(cache=True, nogil=True)
def _slots(count):  # type: ignore[no-untyped-def]
    """Slots of a table for ``count`` entries: a power of two, at most half full."""
    slots = 64
    while slots < 2 * count:
        slots *= 2
    return slots


@njit(cache=True, nogil=True)
def _table(slots):  # type: ignore[no-untyped-def]
    """Keys, stamps and counts of an open table; an entry of epoch 0 is free."""
    return np.empty(slots, np.uint64), np.zeros(slots, np.int32), np.empty(slots, np.int32)


@njit(cache=True, nogil=True)
def _seen_before(hashes, sizes, count, mask, epoch, keys, stamps):  # type: ignore[no-untyped-def]
    """How many entries equal an earlier one, and their characters."""
    number = characters = 0
    for k in range(count):
        at = _slot(hashes[k], mask, epoch, keys, stamps)
        if stamps[at] == epoch:
            number += 1
            characters += sizes[k]
        keys[at], stamps[at] = hashes[k], epoch
    return number, characters


@njit(cache=True, nogil=True)
def _top(code, size, count, n, mask, epoch, keys, stamps, counts):  # type: ignore[no-untyped-def]
    """Characters in the most frequent n-gram (of equals the longest); 0 where none occurs twice."""
    best = best_chars = 1
    power = _ONE
    for _ in range(n):
        power *= _BASE
    rolling, characters = _ZERO, 0
    for k in range(count):
        rolling = rolling * _BASE + code[k]
        characters += size[k]
        if k >= n:
            rolling -= power * code[k - n]
            characters -= size[k - n]
        if k < n - 1:
            continue
        h = _mix(rolling)
        at = _slot(h, mask, epoch, keys, stamps)
        if stamps[at] != epoch:
            keys[at], stamps[at], counts[at] = h, epoch, 0
        counts[at] += 1
        if counts[at] > best or (counts[at] == best and characters > best_chars):
            best, best_chars = counts[at], characters
    return best * best_chars if best > 1 else 0


@njit(cache=True, nogil=True)
def _repeated(code, size, count, n, mask, epoch, keys, stamps):  # type: ignore[no-untyped-def]
    """Characters in n-grams that stood before, none counted twice: after a repeated one reading goes on behind it."""
    k = covered = 0
    power = _ONE
    for _ in range(n):
        power *= _BASE
    h, held = _ZERO, 0  # rolling hash of the tokens k - n .. k - 1, of which ``held`` are in
    for k in range(count):
        h = h * _BASE + code[k]
        held += 1
        if held > n:
            h -= power * code[k - n]
        if held < n:
            continue
        key = _mix(h)
        at = _slot(key, mask, epoch, keys, stamps)
        if stamps[at] == epoch:
            for j in range(k - n + 1, k + 1):
                covered += size[j]
            h, held = _ZERO, 0
        keys[at], stamps[at] = key, epoch
    return covered


@njit(cache=True, nogil=True)
def _ratios(tally, out):  # type: ignore[no-untyped-def]
    """Signals that are ratios of counts, in the order of ``SIGNALS`` from "words" to "policy_lines"."""
    words = tally[_WORDS] + tally[_DENSE] // DENSE_WORD + tally[_LONG] // LONG_WORD
    per_word, per_char = max(words, 1), max(tally[_CHARS], 1)
    out[0], out[1] = words, tally[_WORD_CHARS] / max(tally[_WORDS], 1)
    out[2], out[3] = (tally[_DENSE] + tally[_LONG]) / per_char, tally[_ALNUM] / per_char
    out[4], out[5], out[6] = tally[_HASH] / per_word, tally[_DOTS] / per_word, tally[_NEWLINES] / per_word
    out[7] = tally[_ALPHABETIC] / max(tally[_TOKENS], 1)
    out[9], out[10], out[11] = tally[_SENTENCES], tally[_CURLY], tally[_LOREM]
    for k in range(6):
        out[12 + k] = tally[_BULLETS + k] / max(tally[_LINES], 1)


@njit(cache=True, nogil=True)
def _stop_words(code, count, listed):  # type: ignore[no-untyped-def]
    """How many of the listed codes occur."""
    found = 0
    for k in range(count):
        for j in range(listed.shape[0]):
            if code[k] == listed[j]:
                found |= 1 << j
    total = 0
    for j in range(listed.shape[0]):
        total += found >> j & 1
    return total


@njit(cache=True, nogil=True)
def _repetition(count, code, size, line, lines, paragraph, paragraphs, tally, table, epoch, row):  # type: ignore[no-untyped-def]
    """Signals from "duplicate_lines" to "repeated_10gram" into ``row``; returns the last epoch used of the ``table``.

    ``line``, ``paragraph``: hashes; ``lines``, ``paragraphs``: their characters.
    """
    keys, stamps, counts = table
    mask, chars = np.uint64(_slots(count) - 1), max(tally[_CHARS], 1)
    number, covered = _seen_before(line, lines, tally[_LINES], mask, epoch + 1, keys, stamps)
    row[18], row[19] = number / max(tally[_LINES], 1), covered / chars
    number, covered = _seen_before(paragraph, paragraphs, tally[_PARAGRAPHS], mask, epoch + 2, keys, stamps)
    row[20], row[21] = number / max(tally[_PARAGRAPHS], 1), covered / chars
    for n in range(2, 5):
        covered = _top(code, size, count, n, mask, epoch + n + 1, keys, stamps, counts)
        row[20 + n] = min(1.0, covered / chars)
    for n in range(5, 11):
        covered = _repeated(code, size, count, n, mask, epoch + n + 1, keys, stamps)
        if covered == 0:  # then every n-gram is new, and so is every longer one
            break
        row[20 + n] = covered / chars
    return epoch + 11


@njit(cache=True, nogil=True)
def signal_matrix(flat, offsets, flags, stop_list, stop_codes):  # type: ignore[no-untyped-def]
    """Every signal of every document, float32 [n, len(SIGNALS)].

    ``stop_list`` int64 [n]: row of ``stop_codes`` uint64 [lists, 8] that holds for the document, or -1.
    """
    documents = offsets.shape[0] - 1
    out = np.zeros((documents, len(SIGNALS)), np.float32)
    longest = 0
    for d in range(documents):
        longest = max(longest, offsets[d + 1] - offsets[d])
    room = longest + 2  # pages that are never touched are never backed by memory
    code, raw = np.empty(room, np.uint64), np.empty(room, np.uint64)
    size, letters = np.empty(room, np.int32), np.empty(room, np.int32)
    kind, first, last = np.empty(room, np.uint8), np.empty(room, np.uint8), np.empty(room, np.uint8)
    line, line_size = np.empty(room // 2 + 2, np.uint64), np.empty(room // 2 + 2, np.int32)
    paragraph, paragraph_size = np.empty(room // 2 + 2, np.uint64), np.empty(room // 2 + 2, np.int32)
    table, epoch = _table(1 << 12), 0
    for d in range(documents):
        tally, row = np.zeros(_COUNT, np.int64), out[d]
        read = _tokens(flat[offsets[d] : offsets[d + 1]], flags, code, raw, size, letters, kind, first, last, tally)
        _lines(read, code, raw, size, first, last, line, line_size, paragraph, paragraph_size, tally)
        count = _words(read, code, size, letters, kind, tally)
        _ratios(tally, row)
        row[8] = _stop_words(code, count, stop_codes[stop_list[d]]) if stop_list[d] >= 0 else -1
        if _slots(count) > table[0].shape[0]:
            table, epoch = _table(_slots(count)), 0
        epoch = _repetition(count, code, size, line, line_size, paragraph, paragraph_size, tally, table, epoch, row)
    return out
