"""A user's corpus: a folder or files of text, pages, JSON lines or Parquet, divided into units."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.sources.base import Item, Reading, Source, Unit, grouped
from data_pipeline.sources.entries import NO_RULES, SUFFIXES, Rules, read_file
from data_pipeline.sources.fingerprint import Fingerprints, unchanged
from refractor_megatron.errors import DataError

#: Text for each byte of a compressed file, roughly; for progress only.
_GROWTH = {".gz": 4.0, ".zst": 4.0, ".parquet": 3.0}


def file_sources(corpus: Path, fingerprints: Fingerprints) -> list[Source]:
    """One source per first-level entry group of ``corpus``: each sub-folder, and the loose files together.

    Raises ``DataError`` if ``corpus`` is missing or holds no file of a known kind. The licence of a user's text is the
    user's business and recorded as "not stated".
    """
    groups = _groups(corpus)
    if not groups:
        raise DataError(f"{corpus} holds no {', '.join(SUFFIXES)} file; point --corpus at text of one of these kinds.")
    root = corpus if corpus.is_dir() else corpus.parent
    return [_source(name, files, root, fingerprints) for name, files in sorted(groups.items())]


def _groups(corpus: Path) -> dict[str, list[Path]]:
    if not corpus.exists():
        raise DataError(f"The corpus {corpus} does not exist; give --corpus an existing folder or file.")
    if corpus.is_file():
        if not corpus.name.endswith(SUFFIXES):
            raise DataError(f"{corpus} is none of {', '.join(SUFFIXES)}; convert it or choose another file.")
        return {corpus.name: [corpus]}
    groups: dict[str, list[Path]] = {}
    for path in files_below(corpus, SUFFIXES):
        top = path.relative_to(corpus).parts
        groups.setdefault(top[0] if len(top) > 1 else corpus.resolve().name, []).append(path)
    return groups


def files_below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files of these kinds below ``folder``, hidden ones left out, in a fixed order."""
    for place, subfolders, names in os.walk(folder, onerror=_unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if name.endswith(suffixes) and not name.startswith("."):
                yield Path(place, name)


def _unreadable(error: OSError) -> None:
    raise DataError(f"Cannot read {error.filename} ({error.strerror}); mend its permissions or move it out.") from error


def _source(name: str, files: list[Path], root: Path, fingerprints: Fingerprints) -> Source:
    table, units = planned(files, root, fingerprints)
    identity = {entry["path"]: entry["sha256"] for entry in table}
    return Source(name, "", "not stated", "", identity, units, files=table)


def planned(
    files: list[Path], root: Path, fingerprints: Fingerprints, rules: Rules = NO_RULES
) -> tuple[tuple[dict[str, Any], ...], tuple[Unit, ...]]:
    """The table of ``files``, which lie below ``root``, and the units that read them by ``rules``.

    Raises ``DataError`` naming a file that cannot be read.
    """
    table: list[dict[str, Any]] = []
    stamps: list[int] = []
    for path in files:
        digest, stat = fingerprints.of(path)
        table.append({"path": path.relative_to(root).as_posix(), "sha256": digest, "bytes": stat.st_size})
        stamps.append(stat.st_mtime_ns)
    units = tuple(
        {
            "kind": "files",
            "files": [{"file": number, **table[number]} for number in run],
            "rules": dict(rules),
            "megabytes": sum(_text_bytes(files[number], table[number]["bytes"]) for number in run) / 1e6,
            "place": {"root": str(root.absolute()), "stamps": [stamps[number] for number in run]},
        }
        for run in grouped([entry["bytes"] for entry in table])
    )
    return tuple(table), units


def _text_bytes(path: Path, size: int) -> float:
    return size * _GROWTH.get(path.suffix, 1.0)


def read_files(unit: Unit, reading: Reading) -> Iterator[Item]:
    """Entries of a unit of files. Raises ``DataError`` naming a file that is not what it was when it was planned."""
    root = Path(unit["place"]["root"])
    for entry, stamp in zip(unit["files"], unit["place"]["stamps"], strict=True):
        path = root / entry["path"]
        _unchanged(path, entry, stamp)
        yield from read_file(path, entry["file"], reading, unit["rules"])
        _unchanged(path, entry, stamp)


def _unchanged(path: Path, entry: dict[str, Any], stamp: int) -> None:
    """Raises ``DataError`` if the file has gone or has other content."""
    try:
        same = unchanged(path, entry["bytes"], stamp, entry["sha256"])
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path} cannot be read any more ({reason}); put it back and run again.") from error
    if not same:
        raise DataError(f"{path} has changed since this build began; run again when nothing writes to it.")
