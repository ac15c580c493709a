"""Compressed files as byte streams that refuse to end early, and to grow without bound."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

from data_pipeline.sources.base import Bad

if TYPE_CHECKING:
    import zstandard

_BLOCK = 1 << 18
#: Compressed bytes given to zstd at once: a run of one byte grows 30 000 times, so that this bounds memory to 64 MB.
_ZSTD_STEP = 2048
#: Text that one compressed file may hold (bytes), and how many times its size from ``_RATIO_FROM`` on.
MAX_TEXT = 1 << 38
MAX_RATIO = 250
_RATIO_FROM = 16 << 20


class Damaged(Exception):
    """The compressed data are not what they claim to be, or stop in the middle."""


def open_stream(path: Path, raw: IO[bytes], max_text: int = MAX_TEXT) -> IO[bytes]:
    """``raw`` uncompressed, by the file's suffix. Reading may raise one of ``errors()``, or ``Bad`` for a bomb.

    Natural text shrinks 3 to 10 times, tables and logs up to about 100 times.
    """
    if path.suffix == ".gz":
        inner: io.RawIOBase = _Raw(gzip.GzipFile(fileobj=raw))
    elif path.suffix == ".zst":
        inner = _ZstdFrames(raw)
    else:
        return raw
    return io.BufferedReader(_Bounded(inner, path.stat().st_size, max_text), buffer_size=_BLOCK)


def errors() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    import zstandard

    return Damaged, zstandard.ZstdError, EOFError, zlib.error, gzip.BadGzipFile


class _Raw(io.RawIOBase):
    """A readable object as a raw stream."""

    def __init__(self, inner: gzip.GzipFile) -> None:
        self._inner = inner

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fills ``buffer`` as far as one step of the decompressor goes."""
        data = self._inner.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Bounded(io.RawIOBase):
    """Counts what comes out, and stops a file that grows beyond reason."""

    def __init__(self, inner: io.RawIOBase, compressed: int, max_text: int) -> None:
        self._inner, self._size = inner, 0
        self._limit = min(max_text, max(_RATIO_FROM, MAX_RATIO * compressed))

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Passes on what the decompressor gives."""
        size = self._inner.readinto(buffer) or 0
        self._size += size
        if self._size > self._limit:
            raise Bad("decompression-bomb", f"grows beyond {self._limit / 1e6:.0f} MB, its limit")
        return size


class _ZstdFrames(io.RawIOBase):
    """Frames one after another. The library's own reader takes a truncated frame for the end of the text."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._block = memoryview(b"")
        self._ready = memoryview(b"")
        self._frame: zstandard.ZstdDecompressionObj | None = None

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fills ``buffer`` as far as the data at hand go; 0 only at a proper end."""
        while not self._ready:
            if not self._block:
                self._block = memoryview(self._raw.read(_BLOCK))
            if not self._block:
                if self._frame is not None:
                    raise Damaged("the last frame is incomplete")
                return 0
            self._ready = memoryview(self._step())
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _step(self) -> bytes:
        import zstandard

        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        step, self._block = self._block[:_ZSTD_STEP], self._block[_ZSTD_STEP:]
        data = self._frame.decompress(step)
        if self._frame.eof:
            rest = len(self._frame.unused_data)
            self._block = memoryview(bytes(step[len(step) - rest :]) + bytes(self._block))
            self._frame = None
        return data
