"""What became of the documents that are not in a dataset: ledger, audit, quarantine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from data_pipeline.filters.audit import SCHEMA, AuditRow, audit_table, rows_table
from data_pipeline.receipts.ledger import Ledger


def write_ledgers(folder: Path, ledgers: Sequence[Ledger]) -> None:
    """``ledger.json``: the chain of all steps."""
    (folder / "ledger.json").write_text(json.dumps([one.as_json() for one in ledgers], indent=1) + "\n")


def write_audit_of(folder: Path, rows: Sequence[AuditRow], files: Iterable[Path]) -> None:
    """``audit.parquet``: the rows of all steps, by document, filter and rule."""
    table = pa.concat_tables([SCHEMA.empty_table(), rows_table(rows), *(audit_table(path) for path in files)])
    order = [(name, "ascending") for name in ("id", "filter", "rule", "source", "detail")]
    parquet.write_table(table.sort_by(order).combine_chunks(), folder / "audit.parquet", compression="zstd")


def write_quarantine(folder: Path, files: Iterable[Path], scrub: bool) -> None:
    """``quarantine.jsonl``: the entries put aside, in the order of the sources; ``scrub``: without PII in samples."""
    from data_pipeline.filters import pii

    with (folder / "quarantine.jsonl").open("wb") as out:
        for path in files:
            with path.open("rb") as lines:
                for line in lines:
                    if scrub:
                        row = json.loads(line)
                        for key in ("sample", "detail"):
                            row[key] = pii.scrub(row[key].encode())[0].decode()
                        line = (json.dumps(row) + "\n").encode()
                    out.write(line)
