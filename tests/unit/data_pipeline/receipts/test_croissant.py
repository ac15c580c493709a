"""Croissant metadata: the reference library finds no fault in it and loads its records."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_pipeline.receipts.croissant import FILE, croissant
from data_pipeline.receipts.ledger import Ledger

DIGEST = "0123456789abcdef" * 4
SOURCES: list[dict[str, Any]] = [
    {
        "name": 'b\u00fccher "quoted"',
        "version": "1:2.0~rc1",
        "licence": "GPL-3+ and 2 more",
        "licence_file": "licences/b",
        "sha256": "ab" * 32,
        "weight": 1.0,
        "documents": 3,
        "bytes": 700,
        "fetched": "2026-10-01T00:00:00+00:00",
    },
    {
        "name": "a",
        "version": "7",
        "licence": "MIT",
        "licence_file": "",
        "sha256": "",
        "weight": 2.0,
        "documents": 2,
        "bytes": 50,
        "fetched": "2026-11-01T00:00:00+00:00",
    },
    {
        "name": "unused",
        "version": "1",
        "licence": "closed",
        "licence_file": "",
        "sha256": "cd" * 32,
        "weight": 1.0,
        "documents": 0,
        "bytes": 0,
    },
]
LEDGERS = [Ledger("ingest", 7, 6, {"blank": 1}), Ledger("dedup", 6, 5, {"near": 1})]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sources.json").write_text(json.dumps(SOURCES))
    (tmp_path / "train.bin").write_bytes(b"\1\0\2\0")
    (tmp_path / "train.idx").write_bytes(b"MMIDIDX")
    (tmp_path / "tokenizer.json").write_text("{}")
    table = {
        "id": pa.array([b"0123456789abcdef", b"fedcba9876543210"], pa.binary(16)),
        "tokens": pa.array([5, 7], pa.int64()),
        "quality": pa.array([0.5, None], pa.float32()),
        "language": pa.array(["de", "en"]),
        "parts": pa.array([[1], []], pa.list_(pa.int8())),
    }
    parquet.write_table(pa.table(table), tmp_path / "documents-train.parquet")
    return tmp_path


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != FILE
    }


def written(folder: Path, ledgers: list[Ledger] = LEDGERS) -> dict[str, Any]:
    (folder / FILE).write_bytes(croissant(folder, "sample", DIGEST, entries(folder), ledgers))
    body: dict[str, Any] = json.loads((folder / FILE).read_bytes())
    return body


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library's own dependencies
def test_reference_library_finds_no_error_and_no_warning(folder: Path) -> None:
    import mlcroissant

    written(folder)
    dataset = mlcroissant.Dataset(jsonld=str(folder / FILE))
    assert not dataset.metadata.ctx.issues.errors and not dataset.metadata.ctx.issues.warnings
    records = list(dataset.records("documents-train"))
    assert [record["documents-train/tokens"] for record in records] == [5, 7]
    assert records[0]["documents-train/id"] == b"0123456789abcdef"
    assert records[1]["documents-train/language"] == b"en"
    assert [record["sources/documents"] for record in dataset.records("sources")] == [3, 2, 0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_reference_library_would_find_a_fault(folder: Path) -> None:
    """It does look: without a hash, or with a field of a file that is not there, it refuses."""
    import mlcroissant

    body = written(folder)
    del body["datePublished"]
    assert len(mlcroissant.Dataset(jsonld=body).metadata.ctx.issues.warnings) == 1
    del body["distribution"][0]["sha256"]
    with pytest.raises(mlcroissant.ValidationError, match="sha256"):
        mlcroissant.Dataset(jsonld=body)
    body = written(folder)
    body["recordSet"][1]["field"][0]["source"]["fileObject"]["@id"] = "gone.parquet"
    with pytest.raises(mlcroissant.ValidationError, match="gone.parquet"):
        mlcroissant.Dataset(jsonld=body)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_reader_refuses_a_file_that_was_changed(folder: Path) -> None:
    """The hashes are those that a reader checks."""
    import mlcroissant

    body = written(folder)
    (entry,) = (one for one in body["distribution"] if one["name"] == "documents-train.parquet")
    assert entry["sha256"] == hashlib.sha256((folder / "documents-train.parquet").read_bytes()).hexdigest()
    entry["sha256"] = "0" * 64
    (folder / FILE).write_text(json.dumps(body))
    with pytest.raises(mlcroissant.GenerationError) as caught:
        list(mlcroissant.Dataset(jsonld=str(folder / FILE)).records("documents-train"))
    assert "is not identical with the reference" in repr(caught.value.__cause__)


def test_every_file_is_there_with_size_and_hash(folder: Path) -> None:
    files = entries(folder)
    found = {one["name"]: one for one in written(folder)["distribution"]}
    assert set(found) == set(files)
    for name, entry in files.items():
        assert found[name]["sha256"] == entry["sha256"] and found[name]["contentSize"] == f"{entry['bytes']} B"
    assert found["train.bin"]["encodingFormat"] == "application/octet-stream" and found["train.bin"]["description"]


def test_sources_in_use_are_named_with_version_and_licence(folder: Path) -> None:
    body = written(folder)
    assert [(one["name"], one["version"], one["license"]) for one in body["isBasedOn"]] == [
        (one["name"], one["version"], one["licence"]) for one in SOURCES[:2]
    ]
    assert body["license"] == ["GPL-3+ and 2 more", "MIT"]
    assert body["datePublished"] == "2026-11-01T00:00:00+00:00"
    assert "5 documents, 750 bytes" in body["description"]


def test_steps_are_told_with_their_counts(folder: Path) -> None:
    assert written(folder)["rai:dataPreprocessingProtocol"] == [
        "ingest: 7 documents in, 6 kept, 1 dropped (blank).",
        "dedup: 6 documents in, 5 kept, 1 dropped (near).",
    ]


def test_bytes_depend_on_the_dataset_alone(folder: Path) -> None:
    files = entries(folder)
    first = croissant(folder, "sample", DIGEST, files, LEDGERS)
    assert croissant(folder, "sample", DIGEST, dict(reversed(files.items())), LEDGERS) == first
    assert croissant(folder, "sample", "f" * 64, files, LEDGERS) != first


def test_columns_without_a_croissant_type_are_left_out(folder: Path) -> None:
    (table,) = (one for one in written(folder)["recordSet"] if one["@id"] == "documents-train")
    assert {field["name"]: field["dataType"] for field in table["field"]} == {
        "id": "sc:Text",
        "tokens": "sc:Integer",
        "quality": "sc:Float",
        "language": "sc:Text",
    }
