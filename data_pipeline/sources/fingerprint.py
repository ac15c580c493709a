"""Content hashes of input files, remembered so that an unchanged corpus is not read again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from data_pipeline.output import write_atomically
from refractor_megatron.errors import DataError

#: A file changed this recently (seconds) may change again within one tick of its time stamp; it is not remembered.
_SETTLE_SECONDS = 2.0


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def unchanged(path: Path, size: int, stamp: int, digest: str) -> bool:
    """Whether a file has the content it was planned with: ``size`` (bytes) and either its modification time ``stamp``
    (ns) or its sha256. One that was only touched is the same file. Raises ``OSError`` if it cannot be read.
    """
    stat = path.stat()
    return stat.st_size == size and (stat.st_mtime_ns == stamp or sha256_of(path) == digest)


class Fingerprints:
    """sha256 by (path, size, times of modification and change, inode), kept in ``<cache>/fingerprints.json``.

    The hash, and so the dataset's digest, depends on content only; the index merely saves reading. Deleting it is safe.
    """

    def __init__(self, cache: Path) -> None:
        self._file = cache / "fingerprints.json"
        self._known: dict[str, list[int | str]] = {}
        self._changed = False
        with contextlib.suppress(OSError, ValueError):  # absent or damaged: hash again
            known = json.loads(self._file.read_bytes())
            self._known = known if isinstance(known, dict) else {}

    def of(self, path: Path) -> tuple[str, os.stat_result]:
        """``(sha256, status)`` of ``path``, both of the same content.

        Raises ``DataError`` if it cannot be read, or changes while it is.
        """
        try:
            stat = path.stat()
            stamp = _stamp(stat)
            key = str(path.resolve())
            entry = self._known.get(key)
            if isinstance(entry, list) and len(entry) == len(stamp) + 1 and entry[:-1] == stamp:
                return str(entry[-1]), stat
            digest = sha256_of(path)
            after = _stamp(path.stat())
        except OSError as error:
            raise DataError(f"Cannot read {path} ({error.strerror}); mend its permissions or move it out.") from error
        if after != stamp:
            raise DataError(f"{path} changed while it was read; run again when nothing writes to it.")
        if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLE_SECONDS:
            self._known[key] = [*stamp, digest]
            self._changed = True
        return digest, stat

    def save(self) -> None:
        """Writes the index if it has grown."""
        if self._changed:
            write_atomically(self._file, json.dumps(self._known))
            self._changed = False


def _stamp(stat: os.stat_result) -> list[int | str]:
    """What differs once a file has been written to. The time of change is the kernel's: no program can set it back."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
