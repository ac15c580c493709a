"""What a character is to the signals: one byte of flags for each code point."""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np
import numpy.typing as npt

# The compiled kernels hold these values: who changes them must touch signal_kernels.py, or numba uses its old cache.
LETTER, NUMBER, SPACE = 1, 2, 4
#: Scripts written without spaces: Han and kana, of about two characters a word; Thai and its neighbours, of about five.
DENSE, LONG = 8, 16
#: Marks that end a sentence, closing quotes (with END: what a finished line ends with), marks that open a list item.
END, QUOTE, BULLET = 32, 64, 128

SENTENCE_ENDS = ".!?…。！？．｡।॥؟۔։።፧᙮᠃။។៕༎⸮‼⁇⁈⁉"
CLOSING_QUOTES = "\"'”’»」』"
BULLETS = "-*•‣◦▪●○■–"
_DENSE = ((0x2E80, 0x2FD5), (0x3005, 0x3007), (0x3021, 0x3029), (0x3041, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF))
_MORE_DENSE = ((0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9D), (0x1B000, 0x1B16F), (0x20000, 0x3FFFF))
_LONG = ((0x0E01, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0xAA60, 0xAA7F))


@cache
def flag_table() -> npt.NDArray[np.uint8]:
    """Flags of every code point, uint8 [0x110000], from this Python's Unicode tables.

    LETTER: category L*; NUMBER: N* and M*; SPACE: ``str.isspace``. Planes 2 and 3 hold Han alone.
    """
    table = np.zeros(0x110000, np.uint8)
    for point in range(0x20000):
        character = chr(point)
        kind = unicodedata.category(character)[0]
        if kind == "L":
            table[point] = LETTER
        elif kind in "NM":
            table[point] = NUMBER
        elif character.isspace():
            table[point] = SPACE
    table[0xE0100:0xE01F0] = NUMBER  # variation selectors are marks
    table[0x20000:0x40000] = LETTER
    for ranges, flag in ((_DENSE + _MORE_DENSE, DENSE), (_LONG, LONG)):
        for start, stop in ranges:
            part = table[start : stop + 1]
            part[(part & (LETTER | NUMBER)) != 0] |= flag
    for marks, flag in ((SENTENCE_ENDS, END), (CLOSING_QUOTES, QUOTE), (BULLETS, BULLET)):
        table[[ord(mark) for mark in marks]] |= flag
    table.setflags(write=False)
    return table
