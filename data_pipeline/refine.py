"""The chosen documents as they will be trained on: without the others, duplicate paragraphs cut, PII replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipeline.documents import Document, Part
from data_pipeline.filters.audit import AuditRow, write_audit
from data_pipeline.shards import SCHEMA, Shard, parts_of, write_batch


def refine_task(params: dict[str, Any], index: int, out: Path) -> None:
    """Writes ``00000.arrow``, ``rows.npy`` (rows of the shard that it holds) and ``audit.parquet``.

    params: ``shards``: paths; ``keep``: paths of bool arrays [n] for each; ``cuts``: folders of
    ``dedup.paragraphs.gather_task`` for each, or null; ``pii``: paths of the signals of each with counts of PII, which
    is then replaced, or null.
    """
    shard = Shard(Path(params["shards"][index]))
    rows = np.flatnonzero(np.load(params["keep"][index]))
    edited, audit = _cut(shard, Path(params["cuts"][index])) if params["cuts"] else ({}, [])
    if params["pii"]:
        audit += _scrub(shard, rows[_has_pii(Path(params["pii"][index]))[rows]], edited)
    empty = np.array([row for row, document in edited.items() if document.blank], dtype=np.int64)
    rows = np.setdiff1d(rows, empty)
    np.save(out / "rows.npy", rows)
    write_audit(out / "audit.parquet", audit)
    if len(rows):
        write_batch(out / "00000.arrow", _batch(shard, rows, edited))


def _cut(shard: Shard, folder: Path) -> tuple[dict[int, Document], list[AuditRow]]:
    """Documents without the paragraphs that another one has, by row, and what the audit says of them."""
    from data_pipeline.dedup.paragraphs import audit_rows, cut_text, read_cuts

    edited = {}
    for row, ranges in read_cuts(folder).items():
        document = shard.document(row)
        assert not document.framed, "conversations are never cut"
        edited[row] = Document((Part(cut_text(document.parts[0].data, ranges)),), provenance=document.provenance)
    return edited, list(audit_rows(shard, folder))


def _has_pii(signals: Path) -> npt.NDArray[np.bool_]:
    """Which documents of a shard hold PII, bool [n]."""
    from data_pipeline.filters.pii import KINDS
    from data_pipeline.filters.stages import read_signals

    columns = read_signals(signals)
    found: npt.NDArray[np.bool_] = np.logical_or.reduce([columns[f"pii_{kind}"].astype(np.bool_) for kind in KINDS])
    return found


def _scrub(shard: Shard, rows: npt.NDArray[np.int64], edited: dict[int, Document]) -> list[AuditRow]:
    """Replaces PII in ``rows``, as ``edited`` has them if it does, and puts them there; what the audit says of it."""
    audit = []
    for row in rows.tolist():
        document, counts = _scrubbed(edited.get(row) or shard.document(row))
        if counts:
            edited[row] = document
            audit.append(_audit_row(shard, row, counts))
    return audit


def _scrubbed(document: Document) -> tuple[Document, dict[str, int]]:
    from data_pipeline.filters import pii

    total: dict[str, int] = {}
    parts = []
    for part in document.parts:
        data, counts = pii.scrub(part.data)
        parts.append(Part(data, part.role, part.segment, part.bits))
        for kind, count in counts.items():
            if count:
                total[kind] = total.get(kind, 0) + count
    return Document(tuple(parts), document.framed, document.provenance), total


def _audit_row(shard: Shard, row: int, counts: dict[str, int]) -> AuditRow:
    from data_pipeline.filters.pii import RULE_NAMES

    return AuditRow(
        id=shard.ids[row].tobytes().hex(),
        source=int(shard.numbers("source")[row]),
        action="change",
        filter="pii",
        score=float(sum(counts.values())),
        threshold=0.0,
        rule=", ".join(RULE_NAMES[kind] for kind in sorted(counts)),
        detail=", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())),
    )


def _batch(shard: Shard, rows: npt.NDArray[np.int64], edited: dict[int, Document]) -> pa.RecordBatch:
    """The rows of ``shard``, with edited documents in place of theirs. Ids stay those of the text as read."""
    batch = shard.batch if len(rows) == len(shard) else shard.batch.take(pa.array(rows))
    if not any(row in edited for row in rows.tolist()):
        return batch
    columns = {name: batch.column(name) for name in SCHEMA.names}
    texts, parts, keys = (columns[name].to_pylist() for name in ("text", "parts", "key"))
    for place, row in enumerate(rows.tolist()):
        if (document := edited.get(row)) is not None:
            texts[place] = b"".join(part.data for part in document.parts)
            parts[place] = parts_of(document) if document.framed else None
            keys[place] = document.key
    columns["text"] = pa.array(texts, type=SCHEMA.field("text").type)
    columns["key"] = pa.array(keys, type=SCHEMA.field("key").type)
    columns["parts"] = pa.array(parts, type=SCHEMA.field("parts").type)
    return pa.RecordBatch.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)
