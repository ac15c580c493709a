"""Rows of Parquet files, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any

from data_pipeline.provenance import FIELDS
from data_pipeline.sources.base import Bad, Item, Reading
from data_pipeline.sources.compressed import MAX_RATIO
from data_pipeline.sources.entries import Entries, Rules

_BATCH_ROWS = 1024
_BATCH_BYTES = 16 << 20
_SMALL = 1 << 16


def read_parquet(path: Path, file: int, reading: Reading, rules: Rules) -> Iterator[Item]:
    """Documents and quarantined rows; a damaged file is quarantined from the first row that cannot be read."""
    row, entries = 0, Entries(file, reading, rules)
    text = rules["fields"].get("text", "text")
    try:
        for batch in _batches(path, rules):
            names = batch.schema.names
            for values in zip(*(_values(column, reading) for column in batch.columns), strict=True):
                row += 1
                entry = dict(zip(names, values, strict=True))
                fault = next((value for value in values if isinstance(value, Bad)), None)
                if fault is not None:
                    yield fault.at(file, row)
                else:
                    sample = str(entry.get(text) or "")[:200].encode(errors="replace")
                    yield from entries.entry(entry, row, sample)
    except Bad as bad:
        yield bad.at(file, row + 1)
        reading.counts["lost_bytes"] += path.stat().st_size


def _batches(path: Path, rules: Rules) -> Iterator[Any]:
    """Record batches of the columns that ``rules`` ask for. Raises ``Bad`` for a file that cannot be read further."""
    import pyarrow
    from pyarrow import parquet

    seen = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as table:
            columns, rows = _columns(table.schema_arrow.names, rules), table.metadata.num_rows
            size = sum(table.metadata.row_group(i).total_byte_size for i in range(table.metadata.num_row_groups))
            if size > MAX_RATIO * max(path.stat().st_size, _SMALL):
                raise Bad("decompression-bomb", f"claims to hold {size / 1e6:.0f} MB")
            step = max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(size, 1)))
            for batch in table.iter_batches(batch_size=step, columns=columns):
                seen += batch.num_rows
                yield batch
    except (pyarrow.ArrowException, ValueError, KeyError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's fault, not the file's
            raise
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise Bad("damaged-parquet", f"unreadable after row {seen} ({reason})") from error
    if seen != rows:
        raise Bad("damaged-parquet", f"{seen} rows where the footer says {rows}")


def _columns(names: list[str], rules: Rules) -> list[str]:
    fields, schema = rules["fields"], rules["schema"] or {}
    payload = [fields.get(name, name) for name in ("text", "messages")]
    if not set(payload) & set(names):
        raise Bad("wrong-schema", f"no column named {' or '.join(payload)}")
    asked = {fields.get(name, name) for name in ("text", "messages", *FIELDS)}
    asked |= {*schema.get("properties", ()), *schema.get("required", ())}
    return [name for name in names if name in asked]


def _values(column: Any, reading: Reading) -> Iterator[Any]:
    """Values of a column as JSON knows them; a cell that has none is a ``Bad``."""
    import pyarrow

    kind = column.type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_binary(kind):
        column = column.cast(pyarrow.binary())  # not checked by pyarrow, whose error would be the whole batch's
    elif pyarrow.types.is_large_string(kind) or pyarrow.types.is_large_binary(kind):
        column = column.cast(pyarrow.large_binary())
    for cell in column:
        try:
            yield _jsonable(cell.as_py(), reading)
        except Bad as bad:
            yield bad
        except UnicodeDecodeError as error:
            yield Bad("invalid-utf8", f"byte {error.start + 1} of a cell: {error.reason}")
        except (ValueError, OverflowError, pyarrow.ArrowException) as error:  # for example a date beyond the year 9999
            yield Bad("wrong-schema", f"a cell has no value ({str(error)[:100]})")


def _jsonable(value: Any, reading: Reading) -> Any:
    if isinstance(value, bytes):
        if len(value) > reading.max_line:
            raise Bad("too-long", f"{len(value) / 1e6:.1f} MB; the limit is {reading.max_line / 1e6:g} MB")
        return value.decode()
    if isinstance(value, dict):
        return {key: _jsonable(item, reading) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item, reading) for item in value]
    return value.isoformat() if isinstance(value, datetime | date) else value
