"""A single document or sample of a dataset, as lines: where it is from, how it is recorded, what it says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from data_pipeline.pack.indexed import read_indexed
from data_pipeline.pack.records import read_records
from data_pipeline.packed_stream import open_stage, stage_lengths
from data_pipeline.provenance import FILE as PROVENANCE
from data_pipeline.provenance import FOREVER, UNDATED
from data_pipeline.report.contents import Contents, file_name
from data_pipeline.report.html import visible
from data_pipeline.report.overview import audit_line
from data_pipeline.samples import Sample, Stream
from refractor_megatron.distinction.roles import ROLES, MaskBit, RecordPolicy
from refractor_megatron.errors import DataError
from refractor_megatron.tokenizer import Tokenizer

#: Tokens of a document, and of a piece of a sample, and pieces shown unless all is asked for.
DOCUMENT_TOKENS, HEAD_TOKENS, PIECES = 400, 24, 16
_STORES = ("train", "heldout", "tasks")
_ID_DIGITS = 32


@dataclass(frozen=True)
class _Found:
    """Document ``row`` of ``store``; ``number`` counts training documents, then held-out ones, then tasks."""

    store: str
    row: int
    number: int


def document(data: Contents, wanted: str, full: bool) -> Iterator[str]:
    """Document ``wanted``, a number or an id (hex), or what became of it. Raises ``DataError`` if there is none."""
    found = _find(data, wanted)
    if found is None:
        yield from _gone(data, wanted)
        return
    tokenizer = Tokenizer.load(data.folder / "tokenizer.json")
    yield from _about(data, found)
    tokens = read_indexed(data.folder / found.store)
    low, high = (int(tokens.starts[found.row + one]) for one in (0, 1))
    records = read_records(data.folder / found.store)
    first, last = (int(records.first[found.row + one]) for one in (0, 1))
    at = 0
    for length, segment, role, bits in records.spans[first:last].tolist():
        yield f"  tokens {at}..{at + length - 1}: segment {segment}, {ROLES[role]}, bits {bit_names(bits)}"
        at += length
    end = high if full else min(high, low + DOCUMENT_TOKENS)
    yield visible(tokenizer.decode(tokens.tokens[low:end].tolist(), show_specials=True).decode(errors="replace"))
    if end < high:
        yield f"... {high - end} more tokens: --full shows them"


def _find(data: Contents, wanted: str) -> _Found | None:
    """The document, ``None`` for an id that no document of the dataset has."""
    counts = [len(read_indexed(data.folder / store).starts) - 1 for store in _stores(data)]
    firsts = np.concatenate([[0], np.cumsum(counts)]).tolist()
    if wanted.isdecimal() and len(wanted) < _ID_DIGITS:
        number = int(wanted)
        if number >= firsts[-1]:
            raise DataError(f"{data.folder} has documents 0 to {firsts[-1] - 1}, not {number}; give one of these.")
        place = int(np.searchsorted(firsts, number, side="right")) - 1
        return _Found(_STORES[place], number - firsts[place], number)
    try:
        identity = bytes.fromhex(wanted)
    except ValueError:
        identity = b""
    if len(wanted) != _ID_DIGITS or len(identity) * 2 != _ID_DIGITS:
        raise DataError(f"--document {wanted} is neither a number nor an id of {_ID_DIGITS} hexadecimal digits.")
    for place, split in enumerate(("train", "heldout")):
        row = data.row_of(split, identity)
        if row is not None:
            return _Found(split, row, firsts[place] + row)
    return None


def _stores(data: Contents) -> list[str]:
    return [store for store in _STORES if (data.folder / f"{store}.idx").exists()]


def _gone(data: Contents, wanted: str) -> Iterator[str]:
    rows = _audit_of(data, wanted)
    if not rows:
        raise DataError(
            f"{data.folder} has no document {wanted} and no audit row of it: it was never read, or is over "
            "data.max_mb; give another id."
        )
    yield f"document {wanted} is not in the dataset"
    yield from (f"  {line}" for line in rows)


def _audit_of(data: Contents, identity: str) -> list[str]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if data.audit is None:
        return []
    rows = data.audit.filter(pc.equal(data.audit["id"], pa.scalar(bytes.fromhex(identity), pa.binary(16))))
    return [audit_line(data, row) for row in rows.to_pylist()]


def _about(data: Contents, found: _Found) -> Iterator[str]:
    if found.store == "tasks":
        yield f"document {found.number}: made task {found.row}"
        return
    name = "training" if found.store == "train" else "held-out"
    documents = data.documents(found.store)
    if documents is None:
        yield f"document {found.number}: {name} document {found.row}"
        return
    identity, row = data.id_of(found.store, found.row).hex(), found.row
    source = int(documents.source[row])
    said = data.sources[source]
    yield f"document {found.number}: {name} document {row}, id {identity}"
    where = f"{file_name(data.sources, source, int(documents.file[row]))}, position {documents.position[row]}"
    yield f"  from {said['name']} {said['version']} ({said['licence']}), {where}"
    quality = "" if np.isnan(documents.quality[row]) else f", quality {documents.quality[row]:.3f}"
    domains = data.manifest.get("domains", [])
    yield (
        f"  {documents.bytes[row]} bytes, {documents.tokens[row]} tokens, language {documents.language[row]}{quality}"
        + (f", domain {domains[int(documents.domain[row])]}" if domains else "")
    )
    if found.store == "train":
        yield f"  {_provenance(data, row)}"
    yield from (f"  {line}" for line in _audit_of(data, identity))


def _provenance(data: Contents, row: int) -> str:
    entry = np.load(data.folder / PROVENANCE, mmap_mode="r")[row]
    stamp = int(entry["timestamp"])
    when = "undated" if stamp == UNDATED else datetime.fromtimestamp(stamp, UTC).isoformat()
    policy = RecordPolicy(int(entry["policy"]))
    allowed = ", ".join(str(one.name).lower().replace("_", " ") for one in RecordPolicy if one in policy) or "nothing"
    age = "" if int(entry["ttl_s"]) == FOREVER else f", for {int(entry['ttl_s'])} s"
    name = data.manifest["provenance_sources"][int(entry["source"])]
    return f"provenance: {name}, {when}, trust {float(entry['trust']):g}, {allowed}{age}"


def sample(data: Contents, index: int, stage: int | None, seed: int, full: bool) -> Iterator[str]:
    """Training sample ``index`` of the stage of ``stage`` tokens (by default the shortest): its pieces.

    Raises ``DataError`` for a stage that the dataset has not, or where it has none and ``stage`` is not given.
    """
    lengths = stage_lengths(data.manifest)
    if stage is None and not lengths:
        raise DataError(f"{data.folder} has no stages: say how long the sample shall be with --stage, in tokens.")
    length = lengths[0] if stage is None else stage
    if index < 0 or length < 1 or (lengths and length not in lengths):
        known = f"--stage one of {', '.join(map(str, lengths))}" if lengths else "--stage at least 1"
        raise DataError(f"{data.folder} has no sample {index} of length {length}; give --sample from 0 and {known}.")
    stream = open_stage(data.folder, length, seed)
    one = stream.sample(index)
    tokenizer = Tokenizer.load(data.folder / "tokenizer.json")
    edges = np.append(np.flatnonzero(np.diff(one.records[:, 0], prepend=-1)), len(one.tokens)).tolist()
    yield (
        f"sample {index} of {stream.samples_per_epoch} in a pass, {length} tokens and one to predict, seed {seed}: "
        f"{len(edges) - 1} pieces"
    )
    names = _Names(data, stream)
    shown = len(edges) - 1 if full else min(PIECES, len(edges) - 1)
    for low, high in zip(edges[:shown], edges[1:], strict=False):
        yield f"tokens {low}..{high - 1}: {names(int(one.documents[low]), high - low)}"
        yield from (f"  {line}" for line in _runs(one, low, high))
        text = tokenizer.decode(one.tokens[low : min(high, low + HEAD_TOKENS)].tolist(), show_specials=True)
        yield f"  {text.decode(errors='replace')!r}"
    if shown < len(edges) - 1:
        yield f"... {len(edges) - 1 - shown} more pieces: --full shows them"


class _Names:
    """What a piece of a document is called."""

    def __init__(self, data: Contents, stream: Stream) -> None:
        self._data = data
        self._starts = {store: read_indexed(data.folder / store).starts for store in _stores(data)}
        self._splits = [data.manifest["splits"][split]["documents"] for split in ("train", "heldout")]

    def __call__(self, number: int, tokens: int) -> str:
        """``number``: of the document in the dataset; ``tokens``: of the piece."""
        train, heldout = self._splits
        store, row = ("train", number) if number < train else ("tasks", number - train - heldout)
        length = int(self._starts[store][row + 1] - self._starts[store][row])
        part = "whole" if tokens == length else f"{tokens} of its {length} tokens"
        if store == "tasks":
            return f"document {number}, made task {row}, {part}"
        documents = self._data.documents("train")
        if documents is None:
            return f"document {number}, {part}"
        source = self._data.sources[int(documents.source[row])]["name"]
        return f"document {number}, {source}, {documents.language[row]}, {part}"


def _runs(one: Sample, low: int, high: int) -> list[str]:
    """Lines for the runs of equal records in a piece; none where it is one run of plain text."""
    rows = one.records[low:high]
    lines = record_runs(rows, low)
    plain = len(lines) == 1 and rows[0, 3] == 0
    return [] if plain else [*lines[:6], *([f"... {len(lines) - 6} more runs"] if len(lines) > 6 else [])]


def record_runs(records: npt.NDArray[np.int32], first: int = 0) -> list[str]:
    """One line for each run of equal records int32 [n, 4]; tokens count from ``first``."""
    starts = np.flatnonzero(np.any(np.diff(records, axis=0, prepend=-1) != 0, axis=1))
    ends = [*starts[1:].tolist(), len(records)]
    lines = []
    for start, end in zip(starts.tolist(), ends, strict=True):
        number, segment, role, bits = records[start].tolist()
        lines.append(
            f"tokens {first + start}..{first + end - 1}: document {number}, segment {segment}, {ROLES[role]}, "
            f"bits {bit_names(bits)}"
        )
    return lines


def bit_names(bits: int) -> str:
    """Names of mask bits."""
    return "|".join(str(bit.name) for bit in MaskBit if bits & bit) or "-"
