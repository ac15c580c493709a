"""Incremental decoding: tokens may end in the middle of a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class StreamDecoder:
    """Turns ids into text as they come, holding back the bytes of an unfinished character.

    Bytes that can no longer become UTF-8 appear as U+FFFD, as in ``bytes.decode(errors="replace")``; the concatenation
    of all ``push`` results and ``flush`` equals that decoding of the whole. Special tokens print nothing.
    """

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Text that is complete after ``token``; possibly empty."""
        return self._decoder.decode(self._table[token])

    def flush(self) -> str:
        """Text of the bytes still held back, then a fresh start."""
        tail = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return tail
