"""Cuts text before a BPE library sees it: valid UTF-8 runs, bounded pieces.

Both libraries take ``str``, so bytes that are not UTF-8 must leave the text first; and both have costs that grow faster
than the length of a single run (a backtracking split regex, a merge loop over one long word), so long inputs are cut
at places that depend on the text alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

#: GPT-4 style split: contractions, words with one leading mark, up to three digits, punctuation, line ends, spaces.
SPLIT_PATTERN = (
    r"'(?:[sdmtSDMT]|ll|LL|ve|VE|re|RE)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

#: No piece given to the encoder is longer (characters). Shorter inputs, nearly all documents, are never cut.
PIECE_CHARS = 65_536
#: A cut moves back to the last line end if one lies this close before it (characters).
LINE_END_REACH = 4_096
#: Longest run without (or of only) white space that the trainer may see as one word (characters).
TRAIN_RUN_CHARS = 128

_ESCAPED = re.compile("[\udc80-\udcff]+")
_LONG_RUN = re.compile(rf"\S{{{TRAIN_RUN_CHARS}}}|\s{{{TRAIN_RUN_CHARS}}}")


def bounded(text: str, limit: int = PIECE_CHARS, reach: int = LINE_END_REACH) -> Iterator[str]:
    """Consecutive pieces of ``text``, each of 1..``limit`` characters; their concatenation is ``text``."""
    start, end = 0, len(text)
    while end - start > limit:
        cut = text.rfind("\n", start + limit - reach, start + limit) + 1 or start + limit
        yield text[start:cut]
        start = cut
    if start < end:
        yield text[start:]


def utf8_runs(data: bytes) -> Iterator[str | bytes]:
    """Splits bytes into maximal runs: ``str`` where they are UTF-8, ``bytes`` where they are not."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        pass
    else:
        if text:
            yield text
        return
    # surrogateescape maps exactly the undecodable bytes to U+DC80..U+DCFF; strict UTF-8 never yields those.
    text = data.decode(errors="surrogateescape")
    start = 0
    for match in _ESCAPED.finditer(text):
        if match.start() > start:
            yield text[start : match.start()]
        yield match.group().encode(errors="surrogateescape")
        start = match.end()
    if start < len(text):
        yield text[start:]


def training_pieces(data: bytes) -> Iterator[str]:
    """Text for the trainer: valid UTF-8 only, no run above ``TRAIN_RUN_CHARS``, no piece above ``PIECE_CHARS``."""
    for run in utf8_runs(data):
        if isinstance(run, bytes):
            continue
        for piece in bounded(run):
            start = 0
            for match in _LONG_RUN.finditer(piece):
                yield piece[start : match.end()]
                start = match.end()
            if start < len(piece):
                yield piece[start:]
