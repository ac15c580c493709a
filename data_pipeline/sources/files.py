"""A user's corpus: a folder or files of text, JSON lines or Parquet."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from data_pipeline.documents import Document, cut_position, plain
from data_pipeline.provenance import FIELDS, UNSTATED, Provenance, provenance_of
from data_pipeline.sources.base import Reading, Source
from data_pipeline.sources.compressed import errors as stream_errors
from data_pipeline.sources.compressed import open_stream
from data_pipeline.sources.fingerprint import Fingerprints
from data_pipeline.sources.messages import conversation
from data_pipeline.sources.strict_json import parse_json
from refractor_megatron.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst")
JSON_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet")
_PARQUET_ROWS = 1024


def file_sources(corpus: Path, fingerprints: Fingerprints) -> list[Source]:
    """One source per first-level entry group of ``corpus``: each sub-folder, and the loose files together.

    Raises ``DataError`` if ``corpus`` is missing or holds no file of a known kind. The licence of a user's text is the
    user's business and recorded as "not stated".
    """
    groups = _groups(corpus)
    if not groups:
        raise DataError(f"{corpus} holds no {', '.join(SUFFIXES)} file; point --corpus at text of one of these kinds.")
    return [_source(name, files, corpus, fingerprints) for name, files in sorted(groups.items())]


def _groups(corpus: Path) -> dict[str, list[Path]]:
    if not corpus.exists():
        raise DataError(f"The corpus {corpus} does not exist; give --corpus an existing folder or file.")
    if corpus.is_file():
        if not corpus.name.endswith(SUFFIXES):
            raise DataError(f"{corpus} is none of {', '.join(SUFFIXES)}; convert it or choose another file.")
        return {corpus.name: [corpus]}
    groups: dict[str, list[Path]] = {}
    for folder, subfolders, names in os.walk(corpus, onerror=_unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if name.endswith(SUFFIXES) and not name.startswith("."):
                path = Path(folder, name)
                top = path.relative_to(corpus).parts
                groups.setdefault(top[0] if len(top) > 1 else corpus.resolve().name, []).append(path)
    return groups


def _unreadable(error: OSError) -> None:
    raise DataError(f"Cannot read {error.filename} ({error.strerror}); mend its permissions or move it out.") from error


def _source(name: str, files: list[Path], corpus: Path, fingerprints: Fingerprints) -> Source:
    root = corpus if corpus.is_dir() else corpus.parent
    identity = {path.relative_to(root).as_posix(): fingerprints.sha256(path) for path in files}

    def read(reading: Reading) -> Iterator[Document]:
        for path in files:
            yield from read_file(path, reading)

    return Source(name, "", "not stated", "", identity, read)


def read_file(path: Path, reading: Reading) -> Iterator[Document]:
    """Documents of one file in order. Raises ``DataError`` naming the file, and the line or row at fault."""
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path, reading)
        elif path.name.endswith(JSON_SUFFIXES):
            yield from _read_jsonl(path, reading)
        else:
            with path.open("rb") as stream:
                yield from read_text(stream, reading)
    except OSError as error:
        raise DataError(f"Cannot read {path} ({error.strerror or error}); mend it or move it out.") from error


def read_text(stream: IO[bytes], reading: Reading, provenance: Provenance = UNSTATED) -> Iterator[Document]:
    """One document, or several of at most ``reading.part_bytes``; memory stays bounded however long the file."""
    limit = reading.part_bytes
    data = stream.read(limit + 1)
    while len(data) > limit:
        cut = cut_position(data, limit)
        reading.counts["cut"] += 1
        reading.text(data[:cut])
        yield plain(data[:cut], provenance)
        data = data[cut:] + stream.read(limit + 1 - (len(data) - cut))
    reading.text(data)
    yield plain(data, provenance)


def _read_jsonl(path: Path, reading: Reading) -> Iterator[Document]:
    number = 0
    with path.open("rb") as raw:
        try:
            for number, line in enumerate(open_stream(path, raw), start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield from _entry(_parse(line, where), where, reading)
        except stream_errors(path) as error:
            raise DataError(f"{path}:{number + 1}: damaged compression ({error}); fetch the file again.") from error


def _parse(line: bytes, where: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}); correct or remove the line.") from error


def _entry(entry: Any, where: str, reading: Reading) -> Iterator[Document]:
    """The documents of one JSON object or Parquet row."""
    fields = [key for key in ("text", "messages") if isinstance(entry, dict) and entry.get(key) is not None]
    if len(fields) != 1:
        raise DataError(f"{where}: an entry needs either a text or a messages field; correct or remove it.")
    provenance = provenance_of(entry, where)
    if fields == ["messages"]:
        document = replace(conversation(entry["messages"], where), provenance=provenance)
        reading.text(b"".join(part.data for part in document.parts))
        yield document
        return
    text = entry["text"]
    if isinstance(text, str):
        text = text.encode(errors="surrogatepass")
    if not isinstance(text, bytes):
        raise DataError(f"{where}: text must be a string, not {type(text).__name__}; correct or remove the entry.")
    yield from read_text(io.BytesIO(text), reading, provenance)


def _read_parquet(path: Path, reading: Reading) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as table:
            columns = [name for name in ("text", "messages") if name in table.schema_arrow.names]
            if not columns:
                raise DataError(f"{path}: no column named text or messages; rename the column that holds the text.")
            columns += [name for name in FIELDS if name in table.schema_arrow.names]
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for values in zip(*(_column(name, batch.column(name)) for name in columns), strict=True):
                    row += 1
                    yield from _entry(dict(zip(columns, values, strict=True)), f"{path}: row {row}", reading)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: unreadable Parquet after row {row} ({reason}); write the file again.") from error


def _column(name: str, column: Any) -> list[Any]:
    """Python values of a column; strings as bytes, so that invalid UTF-8 survives, but for provenance."""
    import pyarrow

    if name in FIELDS:
        pass
    elif pyarrow.types.is_string(column.type):
        column = column.cast(pyarrow.binary())
    elif pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    values: list[Any] = column.to_pylist()
    return values
