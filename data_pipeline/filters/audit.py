"""The audit: one row for each document that a filter dropped or changed, as parquet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.output import mendable_errors
from refractor_megatron.errors import DataError

Action = Literal["drop", "change"]

SCHEMA = pa.schema(
    [
        pa.field("id", pa.binary(16), nullable=False),
        pa.field("source", pa.int32(), nullable=False),  # place in the build's list of sources
        pa.field("action", pa.string(), nullable=False),  # "drop" or "change"
        pa.field("filter", pa.string(), nullable=False),  # language, quality, perplexity, dedup, pii, ...
        pa.field("score", pa.float64()),
        pa.field("threshold", pa.float64()),
        pa.field("rule", pa.string(), nullable=False),  # with its version, as "gopher-top-2gram/1"
        pa.field("detail", pa.string(), nullable=False),
    ]
)
#: Rows are written in groups of this many, so that a writer holds no more.
GROUP = 1 << 16


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One document dropped or changed: by which rule, with what score against what threshold. ``id``: hex."""

    id: str
    source: int
    action: Action
    filter: str
    score: float | None
    threshold: float | None
    rule: str
    detail: str = ""


class AuditWriter:
    """Writes rows in the order given; use as a context. Without rows it writes an empty table.

    The bytes depend on the rows alone (and on pyarrow's version).
    """

    def __init__(self, path: Path) -> None:
        """Raises ``OutputError`` when the file cannot be written."""
        self._path = path
        self._held: list[AuditRow] = []
        with mendable_errors(path):
            self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")

    def add(self, row: AuditRow) -> None:
        """Appends a row."""
        self._held.append(row)
        if len(self._held) >= GROUP:
            self._flush()

    def extend(self, rows: Iterable[AuditRow]) -> None:
        """Appends rows."""
        for row in rows:
            self.add(row)

    def _flush(self) -> None:
        with mendable_errors(self._path):
            self._writer.write_table(rows_table(self._held))
        self._held = []

    def close(self) -> None:
        """Writes what is held and the file's end."""
        if self._held:
            self._flush()
        with mendable_errors(self._path):
            self._writer.close()

    def __enter__(self) -> AuditWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.close()
        else:
            self._writer.close()


def rows_table(rows: Sequence[AuditRow]) -> pa.Table:
    """Rows as an Arrow table of ``SCHEMA``."""
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    columns["id"] = [bytes.fromhex(row.id) for row in rows]
    return pa.table([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


def write_audit(path: Path, rows: Iterable[AuditRow]) -> None:
    """Writes a whole audit file."""
    with AuditWriter(path) as writer:
        writer.extend(rows)


def audit_table(path: Path) -> pa.Table:
    """An audit file as an Arrow table. Raises ``DataError`` for one that is missing, cut short or of another layout."""
    try:
        with pq.ParquetFile(path) as file:
            if file.schema_arrow != SCHEMA:
                raise DataError(f"{path} is no audit file of this version; delete its folder and build again.")
            return file.read()
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"Cannot read {path} ({reason}); delete its folder and build again.") from error


def read_audit(path: Path) -> list[AuditRow]:
    """The rows of an audit file, in order. Raises as ``audit_table``."""
    return [AuditRow(**{**row, "id": row["id"].hex()}) for row in audit_table(path).to_pylist()]


def counts(rows: Iterable[AuditRow]) -> dict[str, int]:
    """Documents dropped by rule, most first, then by name: the ``dropped`` of a stage's ledger."""
    number = Counter(row.rule for row in rows if row.action == "drop")
    return dict(sorted(number.items(), key=lambda item: (-item[1], item[0])))
