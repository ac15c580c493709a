"""A text cut in memory: what the readers, which never hold all of it, must give."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.documents import cut_position


def cut_text(data: bytes, limit: int) -> Iterator[bytes]:
    """Consecutive parts of at most ``limit`` bytes (``limit`` >= 8)."""
    while len(data) > limit:
        cut = cut_position(data, limit)
        yield data[:cut]
        data = data[cut:]
    if data:
        yield data
