"""Content hashes of input files, remembered so that an unchanged corpus is not read again."""

from __future__ import annotations

import contextlib
import hashlib
import json
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


class Fingerprints:
    """sha256 by (path, size, modification time, inode), kept in ``<cache>/fingerprints.json``.

    The hash, and so the dataset's digest, depends on content only; the index merely saves reading. Deleting it is safe.
    """

    def __init__(self, cache: Path) -> None:
        self._file = cache / "fingerprints.json"
        self._known: dict[str, list[int | str]] = {}
        self._changed = False
        with contextlib.suppress(OSError, ValueError):  # absent or damaged: hash again
            known = json.loads(self._file.read_bytes())
            self._known = known if isinstance(known, dict) else {}

    def sha256(self, path: Path) -> str:
        """Content hash of ``path``. Raises ``DataError`` if it cannot be read."""
        try:
            stat = path.stat()
            stamp: list[int | str] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            key = str(path.resolve())
            entry = self._known.get(key)
            if entry is not None and entry[:3] == stamp:
                return str(entry[3])
            digest = sha256_of(path)
        except OSError as error:
            raise DataError(f"Cannot read {path} ({error.strerror}); mend its permissions or move it out.") from error
        if time.time() - stat.st_mtime > _SETTLE_SECONDS:
            self._known[key] = [*stamp, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Writes the index if it has grown."""
        if self._changed:
            write_atomically(self._file, json.dumps(self._known))
            self._changed = False
