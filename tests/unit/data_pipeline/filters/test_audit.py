"""Audit files: what is written is read, the bytes depend on the rows alone, damage is said in one sentence."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.filters import audit
from data_pipeline.filters.audit import SCHEMA, AuditRow, AuditWriter, audit_table, counts, read_audit, write_audit
from refractor_megatron.errors import DataError, OutputError

_numbers = st.none() | st.floats(allow_nan=False)
_rows = st.builds(
    AuditRow,
    id=st.binary(min_size=16, max_size=16).map(bytes.hex),
    source=st.integers(0, 2**31 - 1),
    action=st.sampled_from(["drop", "change"]),
    filter=st.sampled_from(["language", "quality", "pii"]),
    score=_numbers,
    threshold=_numbers,
    rule=st.sampled_from(["a/1", "b/1", "b/2"]),
    detail=st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
)


@given(st.lists(_rows, max_size=20))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_read_back(tmp_path: Path, rows: list[AuditRow]) -> None:
    write_audit(tmp_path / "audit.parquet", rows)
    assert read_audit(tmp_path / "audit.parquet") == rows


def _row(number: int, rule: str = "a/1", action: audit.Action = "drop") -> AuditRow:
    return AuditRow(f"{number:032x}", 0, action, "quality", number / 7, 0.5, rule, "signal")


def test_bytes_depend_on_the_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "GROUP", 4)
    rows = [_row(i) for i in range(11)]
    write_audit(tmp_path / "whole", rows)
    with AuditWriter(tmp_path / "single") as writer:
        for row in rows[:3]:
            writer.add(row)
        writer.extend(rows[3:])
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "single").read_bytes()
    assert pq.ParquetFile(tmp_path / "whole").num_row_groups == 3
    assert read_audit(tmp_path / "whole") == rows


def test_no_rows_are_a_table_as_well(tmp_path: Path) -> None:
    write_audit(tmp_path / "audit.parquet", [])
    assert read_audit(tmp_path / "audit.parquet") == []
    assert audit_table(tmp_path / "audit.parquet").schema == SCHEMA


def test_counts_of_drops_by_rule() -> None:
    rows = [_row(0, "b/1"), _row(1, "a/1"), _row(2, "c/1"), _row(3, "c/1"), _row(4, "d/1", "change")]
    assert list(counts(rows).items()) == [("c/1", 2), ("a/1", 1), ("b/1", 1)]


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "audit.parquet"
    write_audit(path, [_row(i) for i in range(100)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="audit.parquet"):
        read_audit(path)
    with pytest.raises(DataError, match="missing.parquet"):
        read_audit(tmp_path / "missing.parquet")
    pq.write_table(pa.table({"id": [1]}), path)
    with pytest.raises(DataError, match="no audit file"):
        read_audit(path)


def test_an_error_in_the_block_reaches_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), AuditWriter(tmp_path / "audit.parquet") as writer:
        writer.add(_row(1))
        raise ZeroDivisionError


def test_no_folder_to_write_into(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/audit.parquet"):
        write_audit(tmp_path / "file" / "audit.parquet", [])
