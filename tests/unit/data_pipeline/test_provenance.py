"""What documents state about themselves, from the corpus to the table beside the tokens."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from data_pipeline.build import BuiltData
from data_pipeline.provenance import (
    FILE,
    FOREVER,
    HELDOUT_FILE,
    UNDATED,
    UNSTATED,
    Provenance,
    provenance_of,
    read_provenance,
)
from refractor_megatron.distinction.roles import RecordPolicy
from refractor_megatron.errors import DataError
from tests.unit.data_pipeline.corpora import Builder, conversation, write_texts

COPY, TOOLS = RecordPolicy.ALLOW_COPY, RecordPolicy.ALLOW_TOOLS


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({}, UNSTATED),
        ({"source": None, "timestamp": None, "trust": None, "policy": None}, UNSTATED),
        ({"source": "wiki", "trust": 0}, Provenance("wiki", trust=0.0)),
        ({"timestamp": 1_600_000_000.9}, Provenance(timestamp=1_600_000_000)),
        ({"timestamp": "2020-09-13T12:26:40Z"}, Provenance(timestamp=1_600_000_000)),
        ({"timestamp": "2020-09-13 12:26:40"}, Provenance(timestamp=1_600_000_000)),
        ({"timestamp": datetime(2020, 9, 13, 12, 26, 40, tzinfo=UTC)}, Provenance(timestamp=1_600_000_000)),
        ({"policy": {}}, UNSTATED),
        ({"policy": {"allow_tools": True, "ttl_s": 60}}, Provenance(policy=COPY | TOOLS, ttl_s=60)),
        ({"policy": {"allow_copy": False, "allow_tools": None}}, Provenance(policy=RecordPolicy(0))),
    ],
)
def test_stated_values(entry: dict[str, Any], expected: Provenance) -> None:
    assert provenance_of(entry, "f:1") == expected


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"source": 3}, "source must be a name, not 3"),
        ({"source": ""}, "source must be a name"),
        ({"timestamp": "yesterday"}, "timestamp must be unix seconds or ISO 8601, not 'yesterday'"),
        ({"timestamp": True}, "timestamp must be"),
        ({"timestamp": float("nan")}, "timestamp must be"),
        ({"timestamp": 10**400}, "timestamp must be"),
        ({"trust": 1.5}, "trust must be a number from 0 to 1, not 1.5"),
        ({"trust": float("nan")}, "trust must be"),
        ({"trust": "high"}, "trust must be"),
        ({"policy": ["copy"]}, "policy must be an object with allow_copy, allow_tools, ttl_s"),
        ({"policy": {"allow_tool": True}}, "policy must be an object"),
        ({"policy": {"allow_tools": "no"}}, "must be true or false"),
        ({"policy": {"ttl_s": -1}}, r"policy\.ttl_s must be whole seconds"),
        ({"policy": {"ttl_s": 1.5}}, r"policy\.ttl_s must be whole seconds"),
    ],
)
def test_what_cannot_be_understood_is_named(entry: dict[str, Any], reason: str) -> None:
    """Nothing doubtful is taken for the open default."""
    with pytest.raises(DataError, match=f"^corpus.jsonl:7: .*{reason}"):
        provenance_of(entry, "corpus.jsonl:7")


def rows(built: BuiltData) -> list[tuple[str, ...]]:
    table = read_provenance(built.folder, built.manifest["splits"]["train"]["documents"])
    names = built.manifest["provenance_sources"]
    return [(names[row["source"]], *row.tolist()[1:]) for row in table]


def test_table_of_a_corpus_that_states_nothing(builder: Builder, tmp_path: Path) -> None:
    write_texts(tmp_path / "corpus" / "notes", 9)
    write_texts(tmp_path / "corpus" / "other", 12)  # nine of them are the same
    found = rows(builder(tmp_path / "corpus"))
    assert {row[0] for row in found} == {"notes", "other"}
    assert {row[1:] for row in found} == {(UNDATED, 1.0, int(COPY), FOREVER)}


def test_json_lines_and_parquet_state_it_per_document(builder: Builder, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    stated = {"source": "wire", "timestamp": 5, "trust": 0.5, "policy": {"allow_tools": True, "ttl_s": 9}}
    lines = [{"text": f"text {i} of the wire", **stated} for i in range(9)] + [conversation(1) | stated]
    (corpus / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = {name: [value] * 9 for name, value in stated.items()}
    when = datetime(1970, 1, 1, 0, 0, 5, tzinfo=UTC)
    columns |= {"text": [f"row {i} of the table" for i in range(9)], "timestamp": [when] * 9}
    parquet.write_table(pyarrow.table(columns), corpus / "b.parquet")
    assert set(rows(builder(corpus))) == {("wire", 5, 0.5, int(COPY | TOOLS), 9)}


def test_a_long_text_keeps_it_when_cut(builder: Builder, tmp_path: Path) -> None:
    line = {"text": "".join(f"word{i}\n" for i in range(3000)), "source": "book", "trust": 0.25}
    (tmp_path / "book.jsonl").write_text(json.dumps(line))
    found = rows(builder(tmp_path / "book.jsonl"))
    assert len(found) > 5 and {(row[0], row[2]) for row in found} == {("book", 0.25)}


def test_error_names_file_and_line(builder: Builder, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y", "trust": 2}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2 \(wrong-schema: .*trust"):
        builder(tmp_path / "a.jsonl", max_bad_fraction=0.01)


def test_content_digest_does_not_depend_on_it(builder: Builder, tmp_path: Path) -> None:
    """Samples and their order are those of the same texts without provenance; the sources table counts files alike."""
    digests = []
    for trust in (0.1, 0.9):
        corpus = tmp_path / str(trust) / "corpus"
        corpus.mkdir(parents=True)
        lines = [{"text": f"number {i} of the texts", "trust": trust} for i in range(20)]
        (corpus / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        built = builder(corpus)
        digests.append((built.manifest["content_sha256"], built.manifest["files"][FILE]["sha256"]))
    (one, table), (two, other) = digests
    assert one == two and table != other


def _lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_of_equal_documents_the_strictest_word_counts_however_files_lie(builder: Builder, tmp_path: Path) -> None:
    """Tables of both splits, byte for byte, and so the tasks that may be made."""
    free = [{"text": f"text number {i} of them all", "trust": 0.9, "timestamp": 100 + i} for i in range(24)]
    strict = [
        {"text": one["text"], "trust": 0.1, "policy": {"allow_copy": False, "ttl_s": 60}, "timestamp": 50}
        for one in free[::2]
    ]
    layouts: list[dict[str, list[dict[str, Any]]]] = [
        {"a.jsonl": free, "b.jsonl": strict},
        {"a.jsonl": strict, "b.jsonl": free},
        {"c.jsonl": [*strict[:5], *free, *strict[5:]]},
    ]
    tables = []
    for number, layout in enumerate(layouts):
        for name, lines in layout.items():
            _lines(tmp_path / str(number) / "corpus" / name, lines)
        folder = builder(tmp_path / str(number) / "corpus").folder
        tables.append([np.load(folder / name).tolist() for name in (FILE, HELDOUT_FILE)])
    assert tables[0] == tables[1] == tables[2]
    rows = [row[1:] for table in tables[0] for row in table]
    held = (50, float(np.float32(0.1)), 0, 60)
    assert rows.count(held) == 12 and {row[2:] for row in rows if row != held} == {(int(COPY), FOREVER)}


def test_held_out_documents_have_a_table_of_the_same_names(builder: Builder, tmp_path: Path) -> None:
    _lines(tmp_path / "a.jsonl", [{"text": f"text {i} of a wire", "source": f"wire {i}"} for i in range(30)])
    built = builder(tmp_path / "a.jsonl")
    names = built.manifest["provenance_sources"]
    train, heldout = (
        {
            names[row["source"]]
            for row in read_provenance(built.folder, built.manifest["splits"][split]["documents"], file)
        }
        for split, file in (("train", FILE), ("heldout", HELDOUT_FILE))
    )
    assert heldout and not train & heldout and train | heldout == {f"wire {i}" for i in range(30)}
    assert names == sorted(names)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01\x00", None])
def test_damaged_table_is_named(mixed: BuiltData, tmp_path: Path, damage: bytes | None) -> None:
    if damage is None:
        np.save(tmp_path / FILE, np.zeros(3))
    else:
        (tmp_path / FILE).write_bytes(damage)
    with pytest.raises(DataError, match=r"provenance\.npy is (damaged|not of the same build)"):
        read_provenance(tmp_path, 3)
