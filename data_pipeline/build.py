"""Builds a dataset folder from a corpus.

The folder is ``<name>-<digest12>``. The digest covers the code's format version, every parameter, and the identity of
the input: for a user's files their relative names and content hashes (read from an index when size, time stamp and
inode are unchanged, so a second run reads no text), for packages their names, versions and .deb hashes. The same
corpus in another place gives the same folder, and nothing is built twice.

A build works in a temporary folder beside the result and renames it when everything is on disk; a killed build leaves
only that folder, which the next build removes. Files carry no time stamps: rebuilding gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import manifest as manifests
from data_pipeline.documents import PART_BYTES
from data_pipeline.output import draft_folder, exclusive, mendable_errors
from data_pipeline.pack.indexed import IndexedWriter
from data_pipeline.pack.records import RecordWriter
from data_pipeline.progress import Log, Progress
from data_pipeline.provenance import FILE as PROVENANCE_FILE
from data_pipeline.provenance import write_provenance
from data_pipeline.selection import Chosen, Selector, split_heldout
from data_pipeline.sources import open_sources
from data_pipeline.sources.base import Reading, Source
from data_pipeline.tokenise.encode import encode_all
from refractor_megatron.errors import DataError, OutputError
from refractor_megatron.tokenizer import Tokenizer, train_tokenizer

#: Raise when the same input and parameters would give other bytes.
CODE_VERSION = 2
#: A long text is cut so that at least this many parts fit under data.max_mb, but no finer than ``SMALLEST_PART`` bytes.
PARTS_IN_CAP = 16
SMALLEST_PART = 64 << 10
#: Share of the machine's memory that the text may take: it is held twice at worst, and the tokens beside it.
_MEMORY_SHARE = 0.3


@dataclass(frozen=True)
class BuiltData:
    """``folder`` of the dataset, its ``manifest``, and whether this call built it."""

    folder: Path
    manifest: dict[str, Any]
    built: bool


def build(
    corpus: Path | None,
    out_root: Path,
    *,
    name: str,
    vocab_size: int,
    max_mb: float,
    heldout_fraction: float,
    seed: int,
    cache: Path,
    tokenizer: Tokenizer | None = None,
    log: Log = print,
) -> BuiltData:
    """Returns the dataset of ``corpus`` (``None``: the default corpus), building it if it is not there.

    ``vocab_size`` counts special tokens and is an upper bound; ``max_mb`` caps the text in units of 10^6 bytes; text is
    held in memory. ``tokenizer`` encodes it; without one a tokenizer is trained on the text. Raises ``DataError`` for
    an unusable corpus or a tokenizer of more ids, ``OutputError`` if a result cannot be written.
    """
    _check_parameters(name, max_mb, heldout_fraction)
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"The tokenizer has {tokenizer.vocab_size} ids and model.vocab_size is {vocab_size}: "
            f"set model.vocab_size={tokenizer.vocab_size}."
        )
    parameters = {
        "name": name,
        "vocab_size": vocab_size,
        "max_mb": float(max_mb),
        "heldout_fraction": float(heldout_fraction),
        "seed": seed,
        **({} if tokenizer is None else {"tokenizer": tokenizer.digest}),
    }
    with mendable_errors(out_root, cache):
        sources = open_sources(corpus, cache, log)
        digest = _digest(parameters, sources)
        folder = out_root / f"{name}-{digest[:12]}"
        if (folder / "manifest.json").exists():
            return _up_to_date(folder, log)
        with exclusive(out_root, log):
            if (folder / "manifest.json").exists():  # by the build this one has waited for
                return _up_to_date(folder, log)
            if folder.exists():
                raise OutputError(f"{folder} exists but is not a whole dataset; delete it and run again.")
            with draft_folder(folder) as draft:
                manifest = _build_into(draft, sources, parameters, tokenizer, digest, log)
    return BuiltData(folder, manifest, built=True)


def _up_to_date(folder: Path, log: Log) -> BuiltData:
    log(f"data: {folder} is up to date")
    return BuiltData(folder, manifests.load(folder), built=False)


def _check_parameters(name: str, max_mb: float, heldout_fraction: float) -> None:
    if not name or name.startswith(".") or "/" in name:
        raise DataError(f"data.name {name!r} cannot name a folder; use letters, digits and dashes.")
    if max_mb <= 0:
        raise DataError(f"data.max_mb must be above 0, not {max_mb:g}.")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6
    if max_mb > _MEMORY_SHARE * memory:
        raise DataError(
            f"data.max_mb of {max_mb:g} is too much for this machine, where the text must fit in memory; "
            f"lower it to {_MEMORY_SHARE * memory:.0f} or less."
        )
    if not 0 < heldout_fraction < 1:
        raise DataError(f"data.heldout_fraction must lie between 0 and 1, not {heldout_fraction:g}.")


def _digest(parameters: dict[str, Any], sources: list[Source]) -> str:
    inputs = [{"name": s.name, "version": s.version, "identity": s.identity} for s in sources]
    body = {"code": CODE_VERSION, "parameters": parameters, "sources": inputs}
    return hashlib.sha256(manifests.canonical(body)).hexdigest()


def _build_into(
    draft: Path,
    sources: list[Source],
    parameters: dict[str, Any],
    tokenizer: Tokenizer | None,
    digest: str,
    log: Log,
) -> dict[str, Any]:
    cap = int(parameters["max_mb"] * 1e6)
    reading = Reading(min(PART_BYTES, max(SMALLEST_PART, cap // PARTS_IN_CAP)))
    clock = _Clock(log)
    chosen = _collect(sources, parameters, reading, log)
    clock.lap("read and select")
    _write_sources(draft, sources, chosen, log)
    train, heldout = split_heldout(chosen, parameters["heldout_fraction"], parameters["seed"])
    names = write_provenance(
        draft / PROVENANCE_FILE, [(sources[one.source].name, one.document.provenance) for one in train]
    )
    if tokenizer is None:
        texts = (part.data for one in train for part in one.document.parts)
        tokenizer = train_tokenizer(texts, parameters["vocab_size"])
        clock.lap(f"train tokenizer of {tokenizer.vocab_size} ids")
    tokenizer.save(draft / "tokenizer.json")
    splits = {
        split: _write_split(draft / split, documents, tokenizer, log)
        for split, documents in (("train", train), ("heldout", heldout))
    }
    clock.lap("encode and pack")
    counts = {key: reading.counts[key] for key in ("offered", "blank", "duplicate", "over_cap", "cut", "invalid_utf8")}
    _report(counts, splits, log)
    body = {
        "digest": digest,
        "code_version": CODE_VERSION,
        "parameters": parameters,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.digest},
        "splits": splits,
        "provenance_sources": names,
        "counts": counts,
    }
    return manifests.seal(draft, body, beside=manifests.BESIDE)


class _Clock:
    def __init__(self, log: Log) -> None:
        self._log, self._last = log, time.monotonic()

    def lap(self, what: str) -> None:
        now = time.monotonic()
        self._log(f"data: {what}: {now - self._last:.1f} s")
        self._last = now


def _collect(sources: list[Source], parameters: dict[str, Any], reading: Reading, log: Log) -> list[Chosen]:
    selector = Selector(int(parameters["max_mb"] * 1e6), parameters["seed"], reading.counts)
    last = time.monotonic()
    for number, source in enumerate(sources):
        for document in source.read(reading):
            selector.add(number, document)
            if time.monotonic() - last > 5:
                last = time.monotonic()
                place = f"source {number + 1} of {len(sources)}"
                log(f"data: reading {source.name} ({place}), {selector.read_mb:.0f} MB so far")
    return selector.finish()


def _write_sources(draft: Path, sources: list[Source], chosen: list[Chosen], log: Log) -> None:
    documents = Counter(one.source for one in chosen)
    sizes: Counter[int] = Counter()
    for one in chosen:
        sizes[one.source] += one.document.size
    table = [
        {
            "name": source.name,
            "version": source.version,
            "licence": source.licence,
            "licence_file": source.licence_file,
            "sha256": source.sha256,
            "documents": documents[number],
            "bytes": sizes[number],
        }
        for number, source in enumerate(sources)
    ]
    (draft / "sources.json").write_text(json.dumps(table, indent=1) + "\n")
    for line in sources_table(table):
        log(line)


def sources_table(table: list[dict[str, Any]], limit: int = 20) -> list[str]:
    """Lines of a table of sources, licences and bytes, largest first; the tail beyond ``limit`` is summed up."""
    rows = sorted((row for row in table if row["documents"]), key=lambda row: (-row["bytes"], row["name"]))
    lines = [f"{'source':<32} {'version':<24} {'documents':>9} {'MB':>7}  licence"]
    for row in rows[:limit]:
        lines.append(
            f"{row['name'][:32]:<32} {row['version'][:24]:<24} {row['documents']:>9} {row['bytes'] / 1e6:>7.2f}  "
            f"{row['licence'][:48]}"
        )
    if len(rows) > limit:
        rest = rows[limit:]
        size = sum(row["bytes"] for row in rest) / 1e6
        more = f"{len(rest)} more (see sources.json)"
        lines.append(f"{more:<57} {sum(row['documents'] for row in rest):>9} {size:>7.2f}")
    total = sum(row["bytes"] for row in rows) / 1e6
    lines.append(f"{'total':<57} {sum(row['documents'] for row in rows):>9} {total:>7.2f}")
    return lines


def _write_split(prefix: Path, chosen: list[Chosen], tokenizer: Tokenizer, log: Log) -> dict[str, int]:
    tokens = IndexedWriter(prefix, tokenizer.vocab_size)
    records = RecordWriter(prefix)
    counts = {"documents": 0, "tokens": 0, "bytes": 0}
    total = sum(one.document.size for one in chosen) / 1e6
    threads = len(os.sched_getaffinity(0))
    try:
        with Progress(f"encode {prefix.name}", total, log) as progress:
            for encoded in encode_all(tokenizer, (one.document for one in chosen), threads):
                tokens.add(encoded.tokens)
                records.add(encoded.spans)
                counts["documents"] += 1
                counts["tokens"] += len(encoded.tokens)
                counts["bytes"] += encoded.text_bytes
                progress.advance(encoded.text_bytes / 1e6)
        tokens.close()
        records.close()
    finally:
        tokens.abandon()
    return counts


def _report(counts: dict[str, int], splits: dict[str, dict[str, int]], log: Log) -> None:
    log(
        f"data: skipped {counts['blank']} blank and {counts['duplicate']} duplicate documents and {counts['over_cap']} "
        f"beyond data.max_mb; cut {counts['cut']} times; {counts['invalid_utf8']} documents are not UTF-8 (bytes kept)"
    )
    for split, values in splits.items():
        log(
            f"data: {split}: {values['documents']} documents, {values['tokens']} tokens, {values['bytes'] / 1e6:.2f} MB"
        )
