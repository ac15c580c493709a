"""Personal data and secrets: counting them in documents and replacing them by placeholders. The rules: ``pii_rules``.

A kernel first marks in one pass which documents can hold a match at all; RE2 sees only those.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from numba import njit

from data_pipeline.filters.pii_rules import RULES, Rule, Span

#: Kinds counted, in the order of report columns.
KINDS: Final = ("email", "ip", "phone", "card", "key")
#: Placeholder of each kind. Plain text: a tokenizer encodes it as such, it is never a special token.
#: Versioned rule of each kind, for audit rows.
RULE_NAMES: Final = {rule.kind: rule.name for rule in RULES}

_AT, _NUMBER, _QUAD, _COLON, _TOKEN, _LONG = 1, 2, 4, 8, 16, 32
#: Marks of which a document needs one for the rule to be tried.
_NEEDS: Final = {"email": _AT, "ip": _QUAD | _COLON, "phone": _NUMBER, "card": _LONG, "key": _TOKEN}

_DIGIT, _LETTER, _HEX, _SEPARATOR, _TOKEN_PART = 1, 2, 4, 8, 16


def _classes() -> npt.NDArray[np.uint8]:
    table = np.zeros(256, np.uint8)
    letters = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    groups = (
        (b"0123456789", _DIGIT | _HEX | _TOKEN_PART),
        (letters, _LETTER | _TOKEN_PART),
        (b"abcdefABCDEF", _HEX),
        (b" .-/()+", _SEPARATOR),
        (b"_-+/=.", _TOKEN_PART),
    )
    for characters, bits in groups:
        table[np.frombuffer(characters, np.uint8)] |= bits
    return table


_CLASSES: Final = _classes()


@njit(cache=True, nogil=True)
def _mark(flat, offsets, classes, marks):  # type: ignore[no-untyped-def]  # pragma: no cover (compiled)
    """Sets ``marks[i]`` to what document i holds, from bit 0: an at sign; 7 digits with separators (the shortest
    telephone number); four dotted numbers; a colon after "2xxx" or "3xxx"; 16 characters of a key; 13 digits (the
    shortest card)."""
    for row in range(len(marks)):
        found = np.uint8(0)
        digits = dots = token = 0
        seen = previous = np.uint8(0)
        start = offsets[row]
        for at in range(start, offsets[row + 1]):
            byte = flat[at]
            kind = classes[byte]
            if kind & 16:  # may be part of a key
                token += 1
                seen |= kind
                if token >= 16 and seen & 3 == 3:
                    found |= np.uint8(16)
            else:
                token = 0
                seen = np.uint8(0)
            if kind & 1:
                digits += 1
                if digits >= 7:
                    found |= np.uint8(2)
                if digits >= 13:
                    found |= np.uint8(32)
                if dots >= 3:
                    found |= np.uint8(4)
            else:
                if not kind & 8:
                    digits = 0
                if byte == 46 and previous & 1:
                    dots += 1
                else:
                    dots = 0
                if byte == 64:
                    found |= np.uint8(1)
                elif byte == 58 and at - start >= 4 and (flat[at - 4] == 50 or flat[at - 4] == 51):
                    found |= np.uint8(8)
            previous = kind
        marks[row] = found


def _marks(flat: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    marks = np.zeros(len(offsets) - 1, np.uint8)
    _mark(flat, offsets, _CLASSES, marks)
    return marks


def count(flat: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.int32]]:
    """Matches in each document: for each of ``KINDS`` int32 [n].

    ``flat``: uint8 bytes of all documents; ``offsets``: int64 [n + 1].
    """
    counts = {kind: np.zeros(len(offsets) - 1, np.int32) for kind in KINDS}
    marks = _marks(flat, offsets)
    for row in np.flatnonzero(marks).tolist():
        data = flat[offsets[row] : offsets[row + 1]].tobytes()
        for rule, _ in _matches(data, int(marks[row])):
            counts[rule.kind][row] += 1
    return counts


def scrub(data: bytes) -> tuple[bytes, dict[str, int]]:
    """``data`` with every match replaced by its kind's placeholder, and how many were, by kind (all of ``KINDS``).

    What is left has no match, so that scrubbing again changes nothing: replacing one match can lay bare its neighbour
    (``+49301234567jane@host.de``), hence the passes, usually two. All other bytes stay, invalid UTF-8 included.
    """
    totals = dict.fromkeys(KINDS, 0)
    while True:
        flat = np.frombuffer(data, np.uint8)
        marks = int(_marks(flat, np.array([0, len(data)], np.int64))[0])
        matches = _matches(data, marks) if marks else []
        if not matches:
            return data, totals
        pieces, end = [], 0
        for rule, (start, stop) in matches:
            pieces += [data[end:start], rule.placeholder]
            end = stop
            totals[rule.kind] += 1
        data = b"".join([*pieces, data[end:]])


def _matches(data: bytes, marks: int) -> list[tuple[Rule, Span]]:
    """Matches that do not overlap, in order of place. Of two that overlap, the earlier of ``RULES`` stays."""
    taken: list[tuple[Rule, Span]] = []
    for rule in RULES:
        if marks & _NEEDS[rule.kind]:
            taken = _merged(taken, [(rule, span) for span in rule.find(data)])
    return taken


def _merged(taken: list[tuple[Rule, Span]], added: list[tuple[Rule, Span]]) -> list[tuple[Rule, Span]]:
    """``taken`` with those of ``added`` that overlap neither it nor an earlier one of theirs, in order of place."""
    if not added:
        return taken
    marked = sorted([(span, 0, rule) for rule, span in taken] + [(span, 1, rule) for rule, span in added], key=_place)
    kept: list[tuple[Span, int, Rule]] = []
    for one in marked:
        while kept and one[1] < kept[-1][1] and one[0][0] < kept[-1][0][1]:
            kept.pop()
        if not kept or one[0][0] >= kept[-1][0][1]:
            kept.append(one)
    return [(rule, span) for span, _, rule in kept]


def _place(one: tuple[Span, int, Rule]) -> tuple[int, int, int]:
    return one[0][0], one[1], -one[0][1]
