"""JSON-lines log: one object per line, flushed per line, valid after any kill.

JSON has no NaN or infinity, so these are written as the strings ``"nan"``, ``"inf"`` and ``"-inf"`` and read back as
floats. Finite floats keep all their bits (shortest round-trip decimal).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class JsonlWriter:
    """Appends records to ``path``; each call to `write` reaches the operating system before it returns."""

    def __init__(self, path: Path) -> None:
        # Unbuffered: after a failed write nothing is left behind that closing would try to write again.
        self._file = path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. Raises `OSError` (for example, disk full); the file then may end in a torn line."""
        line = memoryview(_line(record))
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_jsonl(path: Path, key: tuple[str, ...] = ("step",)) -> list[Record]:
    """Records of ``path`` in the order of their first appearance; the last record with an equal ``key`` wins.

    A missing file is an empty log. Lines that are not a JSON object holding every key field are skipped: the only way
    to make one is to be killed or run out of disk in the middle of a line.
    """
    if not path.exists():
        return []
    latest: dict[tuple[Any, ...], Record] = {}
    for record in _parse(path.read_bytes().splitlines()):
        if all(field in record for field in key):
            latest[tuple(record[field] for field in key)] = record
    return list(latest.values())


def rewind_jsonl(path: Path, step: int) -> int:
    """Keep the records with ``record["step"] <= step`` and drop torn lines; returns how many records moved away.

    Called when a run resumes at ``step``. Later records belong to a history that is about to be computed again: they
    are appended to ``<stem>.superseded.jsonl`` beside the log, so nothing is lost and no reader meets a step twice.
    The log is replaced in one rename, so a kill here leaves the old file or the new one.
    """
    if not path.exists():
        return 0
    data = path.read_bytes()
    records = list(_parse(data.splitlines()))
    kept = [record for record in records if record.get("step", 0) <= step]
    moved = [record for record in records if record.get("step", 0) > step]
    content = b"".join(map(_line, kept))
    if content == data:
        return 0
    if moved:
        with path.with_name(f"{path.stem}.superseded.jsonl").open("ab") as aside:
            aside.write(b"".join(map(_line, moved)))
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    return len(moved)


def _parse(lines: Iterable[bytes]) -> Iterable[Record]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield {name: _decode(value) for name, value in record.items()}


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(_encode(record), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.encode() + b"\n"


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _encode(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value
