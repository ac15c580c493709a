"""Entries of a user's files: lines, rows, pages and texts to documents, or to quarantine."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from data_pipeline.documents import Document, cut_position, plain
from data_pipeline.provenance import UNSTATED, Provenance, provenance_of
from data_pipeline.shards import Located
from data_pipeline.sources.base import Bad, Item, Reading
from data_pipeline.sources.compressed import errors as stream_errors
from data_pipeline.sources.compressed import open_stream
from data_pipeline.sources.html import page_text
from data_pipeline.sources.lines import bounded_lines
from data_pipeline.sources.messages import conversation
from data_pipeline.sources.strict_json import parse_json
from data_pipeline.validate.schema import ENTRY, compiled
from refractor_megatron.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst")
JSON_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
HTML_SUFFIXES = (".html", ".htm")
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet", *HTML_SUFFIXES)
#: Format names of a sources file, and the suffixes they stand for.
FORMATS = {"text": TEXT_SUFFIXES, "jsonl": JSON_SUFFIXES, "parquet": (".parquet",), "html": HTML_SUFFIXES}
_PAYLOAD = ("text", "messages")
_NULS = b"\0 \t\r\n\f\v"

Rules = Mapping[str, Any]
#: All rules there are, with the values of a source that states none.
NO_RULES: Rules = {"format": None, "schema": None, "fields": {}, "html": "main-text"}


def read_file(path: Path, file: int, reading: Reading, rules: Rules = NO_RULES) -> Iterator[Item]:
    """Documents and quarantined entries of one file, in order; ``file`` is its number in the source.

    ``rules``: ``format`` (of ``FORMATS``; null: by its suffix), ``schema`` (JSON Schema of an entry, or null),
    ``fields`` (our name of a field: the file's), ``html`` ("main-text" or "all"); all are required. Raises
    ``DataError`` naming a file that cannot be read at all.
    """
    kind = rules["format"] or _format(path)
    try:
        if kind == "parquet":
            from data_pipeline.sources.parquet import read_parquet

            yield from read_parquet(path, file, reading, rules)
        elif kind == "jsonl":
            yield from _read_jsonl(path, file, reading, rules)
        elif kind == "html":
            yield from _read_page(path, file, reading, rules)
        else:
            with path.open("rb") as stream:
                yield from read_text(stream, file, reading)
    except OSError as error:
        raise DataError(f"Cannot read {path} ({error.strerror or error}); mend it or move it out.") from error


def _format(path: Path) -> str:
    return next((name for name, suffixes in FORMATS.items() if path.name.endswith(suffixes)), "text")


def read_text(stream: IO[bytes], file: int, reading: Reading) -> Iterator[Item]:
    """One text, or several parts of at most ``reading.part_bytes``; memory stays bounded however long it is.

    A part's position is its number; a part that is not UTF-8 is quarantined, and the others are kept.
    """
    yield from _items(stream, UNSTATED, file, itertools.count(1), reading)


def entry_text(
    data: bytes, file: int, position: int, reading: Reading, stated: Provenance = UNSTATED
) -> Iterator[Item]:
    """The parts of one entry's text; they share its position."""
    yield from _items(io.BytesIO(data), stated, file, itertools.repeat(position), reading)


def _items(
    stream: IO[bytes], stated: Provenance, file: int, positions: Iterator[int], reading: Reading
) -> Iterator[Item]:
    """The parts of one text. All name the first one's key as their group, also where that one is quarantined."""
    first: Document | None = None
    group: bytes | None = None
    for data in _parts(stream, reading):
        document = plain(data, stated)
        if first is not None:
            group = first.key
            first = None
        yield _checked_part(document, group, file, next(positions))
        if group is None:
            first = document  # hashed only if there is a second part


def _parts(stream: IO[bytes], reading: Reading) -> Iterator[bytes]:
    limit = reading.part_bytes
    data = stream.read(limit + 1)
    while len(data) > limit:
        cut = cut_position(data, limit)
        reading.counts["cut_parts"] += 1
        yield data[:cut]
        data = data[cut:] + stream.read(limit + 1 - (len(data) - cut))
    yield data


def _checked_part(document: Document, group: bytes | None, file: int, position: int) -> Item:
    data = document.parts[0].data
    try:
        data.decode()
    except UnicodeDecodeError as error:
        bad = Bad("invalid-utf8", f"byte {error.start + 1} of the text: {error.reason}")
        return bad.at(file, position, data[max(0, error.start - 40) :])
    if b"\0" in data and not data.strip(_NULS):
        return Bad("nul-bytes", f"{len(data)} bytes, nothing but NUL and white space").at(file, position, data)
    return Located(document, file, position, group)


def _read_jsonl(path: Path, file: int, reading: Reading, rules: Rules) -> Iterator[Item]:
    number, entries = 0, Entries(file, reading, rules)
    with path.open("rb") as raw:
        try:
            for number, line, bad in bounded_lines(open_stream(path, raw), reading.max_line):
                if bad is not None:
                    reading.counts["long_bytes"] += bad.size
                    yield bad.at(file, number, line)
                elif line.strip():
                    yield from entries.line(line, number)
        except stream_errors() as error:
            bad = Bad("damaged-compression", f"what was read before is kept ({error})")
        except Bad as bomb:
            bad = bomb
        else:
            return
    yield bad.at(file, number + 1)
    reading.counts["lost_bytes"] += path.stat().st_size  # how much of it is lost is not known


class Entries:
    """Reads the entries of one file: JSON objects or Parquet rows."""

    def __init__(self, file: int, reading: Reading, rules: Rules) -> None:
        self._file, self._reading = file, reading
        self._fields: dict[str, str] = dict(rules["fields"])
        self._own = compiled(rules["schema"]) if rules["schema"] is not None else None
        self._default = compiled(ENTRY)

    def line(self, line: bytes, number: int) -> Iterator[Item]:
        """The documents of a JSON line, or the reason why it has none."""
        try:
            entry = parse_json(line)
        except UnicodeDecodeError as error:
            bad = Bad("invalid-utf8", f"byte {error.start + 1} of the line: {error.reason}")
        except ValueError as error:
            bad = Bad("field-twice" if "stands twice" in str(error) else "broken-json", f"not valid JSON ({error})")
        else:
            yield from self.entry(entry, number, line)
            return
        yield bad.at(self._file, number, line)

    def entry(self, entry: Any, position: int, sample: bytes) -> Iterator[Item]:
        """The documents of an entry, or the reason why it has none; ``sample``: its first bytes."""
        try:
            entry = self._checked(entry)
            stated = _stated(provenance_of, "provenance", entry)
            if entry.get("messages") is not None:
                document = _stated(conversation, "bad-message", entry["messages"])
                _no_surrogates(entry["messages"])
                yield Located(replace(document, provenance=stated), self._file, position)
                return
            data = _utf8(entry["text"])
        except Bad as bad:
            yield bad.at(self._file, position, sample)
            return
        yield from entry_text(data, self._file, position, self._reading, stated)

    def _checked(self, entry: Any) -> dict[str, Any]:
        """The entry with our names of fields, if it is what its schema asks for, and then what we ask for."""
        wrong = self._own(entry) if self._own is not None else None
        if wrong is None and self._fields and isinstance(entry, dict):
            others = {name: value for name, value in entry.items() if name not in self._fields}
            entry = others | {ours: entry.get(theirs) for ours, theirs in self._fields.items()}
        wrong = wrong or self._default(entry)
        if wrong is not None:
            raise Bad("wrong-schema", wrong)
        return _payload(entry)


def _payload(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry, if it has either a text or messages."""
    if sum(entry.get(name) is not None for name in _PAYLOAD) != 1:
        raise Bad("wrong-schema", "an entry needs either a text or a messages field")
    return entry


def _stated(parse: Any, reason: str, value: Any) -> Any:
    """``parse(value, where)``, with its complaint as the entry's."""
    try:
        return parse(value, "entry")
    except DataError as error:
        raise Bad(reason, str(error)) from error


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise Bad("lone-surrogate", f"character {error.start + 1} is \\u{ord(text[error.start]):04x} alone") from error


def _no_surrogates(messages: list[dict[str, Any]]) -> None:
    for message in messages:
        content = message.get("content")
        if isinstance(content, dict):
            content = content.get("value")
        if isinstance(content, str):
            _utf8(content)


def _read_page(path: Path, file: int, reading: Reading, rules: Rules) -> Iterator[Item]:
    with path.open("rb") as stream:
        data = stream.read(reading.max_line + 1)
    if len(data) > reading.max_line:
        yield Bad("too-long", f"a page above {reading.max_line / 1e6:g} MB").at(file, 1, data)
        return
    try:
        text = page_text(data, main=rules["html"] == "main-text")
    except Bad as bad:
        yield bad.at(file, 1, data)
        return
    yield from read_text(io.BytesIO(text), file, reading)
