"""Tables beside the tokens: sources with licences, one row a document, what was dropped and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import parquet

from data_pipeline.catalogue import Catalogue
from data_pipeline.provenance import FILE as PROVENANCE_FILE
from data_pipeline.provenance import ROW
from data_pipeline.shards import Shard
from data_pipeline.sources.base import Source

#: Columns of ``documents-<split>.parquet``, in the order of the split's documents.
DOCUMENTS = pa.schema(
    [
        ("id", pa.binary(16)),
        ("source", pa.int32()),
        ("file", pa.int32()),  # place in the source's list of files in sources.json
        ("position", pa.int64()),  # line, row or member in the file, from 1
        ("bytes", pa.int64()),
        ("tokens", pa.int64()),
        ("language", pa.string()),
        ("quality", pa.float32()),
        ("domain", pa.int16()),
    ]
)


def write_documents(path: Path, columns: dict[str, Any]) -> None:
    """Writes a table of ``DOCUMENTS``; the same values give the same bytes."""
    table = pa.table({name: pa.array(columns[name], DOCUMENTS.field(name).type) for name in DOCUMENTS.names}, DOCUMENTS)
    parquet.write_table(table, path, compression="zstd")


def gather(catalogue: Catalogue, column: str) -> npt.NDArray[Any]:
    """A number column of all shards, [n]."""
    return np.concatenate([Shard(path).numbers(column) for path in catalogue.shards])


def write_provenance_of(
    folder: Path, catalogue: Catalogue, rows: npt.NDArray[np.int64], sources: Sequence[Source]
) -> list[str]:
    """Writes ``provenance.npy`` of the documents ``rows``; returns the names of their sources, sorted.

    A document that states no source is of the folder or package that it was read from.
    """
    origins: list[str | None] = []
    for path in catalogue.shards:
        origins += Shard(path).batch.column("origin").to_pylist()
    stated = [origins[row] or sources[int(catalogue.sources[row])].name for row in rows.tolist()]
    names = sorted(set(stated))
    number = {name: place for place, name in enumerate(names)}
    table = np.empty(len(rows), dtype=ROW)
    table["source"] = [number[name] for name in stated]
    for column in ("timestamp", "trust", "policy", "ttl_s"):
        table[column] = gather(catalogue, column)[rows]
    np.save(folder / PROVENANCE_FILE, table, allow_pickle=False)
    return names


def write_sources(folder: Path, sources: Sequence[Source], documents: Sequence[int], sizes: Sequence[int]) -> None:
    """Writes ``sources.json``: every source with licence, hash, weight, and its ``documents`` and ``sizes`` (bytes)."""
    table = [
        {
            "name": source.name,
            "version": source.version,
            "licence": source.licence,
            "licence_file": source.licence_file,
            "sha256": source.sha256,
            "weight": source.weight,
            "fetched": source.fetched,
            "documents": int(documents[number]),
            "bytes": int(sizes[number]),
            "files": list(source.files),
        }
        for number, source in enumerate(sources)
    ]
    (folder / "sources.json").write_text(json.dumps(table, indent=1) + "\n")


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
