"""Compressed files as byte streams that refuse to end early."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import zstandard

_BLOCK = 1 << 18


class Damaged(Exception):
    """The compressed data are not what they claim to be, or stop in the middle."""


def open_stream(path: Path, raw: IO[bytes]) -> IO[bytes]:
    """``raw`` uncompressed, by the file's suffix. Reading may raise one of ``errors()``."""
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFrames(raw), buffer_size=_BLOCK)
    return raw


def errors(path: Path) -> tuple[type[Exception], ...]:
    """What reading a damaged file of this suffix raises."""
    if path.suffix == ".zst":
        import zstandard

        return Damaged, zstandard.ZstdError
    return EOFError, zlib.error, gzip.BadGzipFile


class _ZstdFrames(io.RawIOBase):
    """Frames one after another. The library's own reader takes a truncated frame for the end of the text."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._ready = b""
        self._frame: zstandard.ZstdDecompressionObj | None = None

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fills ``buffer`` as far as the data at hand go; 0 only at a proper end."""
        while not self._ready:
            block = self._raw.read(_BLOCK)
            if not block:
                if self._frame is not None:
                    raise Damaged("the last frame is incomplete")
                return 0
            self._ready = self._decompress(block)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _decompress(self, block: bytes) -> bytes:
        import zstandard

        out = []
        while block:
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            out.append(self._frame.decompress(block))
            block = b""
            if self._frame.eof:
                block, self._frame = self._frame.unused_data, None
        return b"".join(out)
