"""Tables beside the tokens: sources with licences, one row a document, what was dropped and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from data_pipeline.catalogue import Catalogue
from data_pipeline.provenance import ROW, UNDATED
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
        ("domain", pa.int32()),
    ]
)
Rows = npt.NDArray[np.int64]
Column: TypeAlias = npt.NDArray[Any] | pa.Array | None
_NEVER = np.iinfo(np.int64).max  # later than any stated time


def write_documents(path: Path, columns: Mapping[str, Column]) -> None:
    """Writes a table of ``DOCUMENTS``; the same values give the same bytes.

    ``columns``: of each name an array [n]: ids uint8 [n, 16], languages as numpy's or Arrow's strings, numbers; None
    where nothing is known.
    """
    known = columns["source"]
    assert known is not None
    rows = len(known)
    arrays = [_arrow(columns[field.name], field.type, rows) for field in DOCUMENTS]
    parquet.write_table(pa.table(arrays, schema=DOCUMENTS), path, compression="zstd")


def _arrow(values: Column, kind: pa.DataType, rows: int) -> pa.Array:
    if values is None:
        return pa.nulls(rows, kind)
    if pa.types.is_fixed_size_binary(kind):
        assert isinstance(values, np.ndarray) and values.shape == (rows, kind.byte_width) and values.dtype == np.uint8
        return pa.FixedSizeBinaryArray.from_buffers(kind, rows, [None, pa.py_buffer(np.ascontiguousarray(values))])
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)


def gather(catalogue: Catalogue, column: str) -> npt.NDArray[Any]:
    """A number column of all shards, [n]."""
    return np.concatenate([Shard(path).numbers(column) for path in catalogue.shards])


def write_provenance_of(
    folder: Path,
    catalogue: Catalogue,
    splits: Mapping[str, Rows],
    equal: tuple[Rows, Rows],
    sources: Sequence[Source],
) -> list[str]:
    """Writes the provenance of each split's documents; returns the names of all their sources, sorted.

    A document that states no source is of the folder or package that it was read from. Where documents were equal and
    one of them was kept, it has the strictest of what they state, so that it does not matter which: what all allow, the
    least trust and lifetime, the oldest stated time, and of their sources the first by name.

    Args:
        catalogue: of the documents as they were read.
        splits: file name -> rows of ``catalogue`` in the order of the split.
        equal: rows [m] of ``catalogue`` that went, and for each one of equal content, which may have gone likewise.
    """
    gone, kept = equal[0], _ends(len(catalogue), *equal)[equal[0]]
    stated = {name: gather(catalogue, name) for name in ("timestamp", "trust", "policy", "ttl_s")}
    stated["source"], origins = _origins(catalogue, sources)
    dated = np.where(stated["timestamp"] == UNDATED, _NEVER, stated["timestamp"])
    for values in (dated, stated["trust"], stated["ttl_s"], stated["source"]):
        np.minimum.at(values, kept, values[gone])
    np.bitwise_and.at(stated["policy"], kept, stated["policy"][gone])
    stated["timestamp"] = np.where(dated == _NEVER, UNDATED, dated)
    used = np.unique(stated["source"][np.concatenate(list(splits.values()))])
    stated["source"] = np.searchsorted(used, stated["source"])
    for file, rows in splits.items():
        table = np.empty(len(rows), dtype=ROW)
        for name in ROW.names or ():
            table[name] = stated[name][rows]
        np.save(folder / file, table, allow_pickle=False)
    names: list[str] = origins.take(pa.array(used)).to_pylist()
    return names


def _ends(count: int, gone: Rows, kept: Rows) -> Rows:
    """Where the way from each of ``count`` documents over ``gone`` -> ``kept`` ends, int64 [count]."""
    onward = np.arange(count)
    onward[gone] = kept
    while not np.array_equal(further := onward[onward], onward):
        onward = further
    return onward


def _origins(catalogue: Catalogue, sources: Sequence[Source]) -> tuple[Rows, pa.Array]:
    """Place of each document's source, int64 [n], among the names, which are sorted and unlike each other."""
    names, large = pa.array([source.name for source in sources], pa.large_string()), pa.large_string()
    columns = []
    for path in catalogue.shards:
        shard = Shard(path)
        read_from = names.take(pa.array(shard.numbers("source")))
        columns.append(pc.coalesce(shard.batch.column("origin").cast(large), read_from).dictionary_encode())
    whole = pa.chunked_array(columns, pa.dictionary(pa.int32(), large)).unify_dictionaries().combine_chunks()
    order = pc.sort_indices(whole.dictionary)
    place = np.empty(len(order), dtype=np.int64)
    place[order.to_numpy()] = np.arange(len(order))
    return place[whole.indices.to_numpy()], whole.dictionary.take(order)


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
