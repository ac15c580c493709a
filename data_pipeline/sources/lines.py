"""Lines of a stream, of bounded length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from data_pipeline.sources.base import Bad

_SKIP = 1 << 20
_SAMPLE = 200


def bounded_lines(stream: IO[bytes], limit: int) -> Iterator[tuple[int, bytes, Bad | None]]:
    """``(number from 1, line, None)``, or the line's first bytes and what is wrong for one longer than ``limit`` bytes.

    Of a long line ``limit`` bytes are held at most; the rest is passed over block by block.
    """
    number = 0
    while line := stream.readline(limit + 2):  # the line and its end
        number += 1
        size = len(line)
        if size <= limit or len(line.rstrip(b"\r\n")) <= limit:
            yield number, line, None
            continue
        sample, ended = line[:_SAMPLE], line.endswith(b"\n")
        del line
        while not ended and (more := stream.readline(_SKIP)):
            size += len(more)
            ended = more.endswith(b"\n")
        yield number, sample, Bad("too-long", f"{size / 1e6:.1f} MB; the limit is {limit / 1e6:g} MB", size)
