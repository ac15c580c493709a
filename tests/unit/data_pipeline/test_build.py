from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import manifest as manifests
from data_pipeline.build import BuiltData
from data_pipeline.pack.indexed import IndexedWriter, read_indexed
from data_pipeline.tables import sources_table
from refractor_megatron.errors import DataError, OutputError
from refractor_megatron.tokenizer import Tokenizer
from tests.unit.data_pipeline.corpora import Builder, write_texts

RECEIPTS = (
    "provenance.npy",
    "documents-train.parquet",
    "documents-heldout.parquet",
    "ledger.json",
    "audit.parquet",
    "quarantine.jsonl",
    "croissant.json",
)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts_of(folder: Path, split: str) -> list[bytes]:
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    data = read_indexed(folder / split)
    ends = zip(data.starts[:-1], data.starts[1:], strict=True)
    return [tokenizer.decode(data.tokens[low:high].tolist()) for low, high in ends]


def test_every_document_arrives_byte_for_byte(builder: Builder, tmp_path: Path) -> None:
    corpus = write_texts(tmp_path / "corpus")
    (corpus / "blank.txt").write_text(" \n")
    shutil.copy(corpus / "000.txt", corpus / "copy.txt")
    built = builder(corpus)
    train, heldout = texts_of(built.folder, "train"), texts_of(built.folder, "heldout")
    originals = {path.read_bytes() for path in corpus.iterdir()} - {b" \n", (corpus / "bytes.txt").read_bytes()}
    assert train and heldout and not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(originals)
    counts = built.manifest["counts"]
    assert (counts["blank"], counts["duplicate"], counts["quarantined"]) == (1, 1, 1)


def test_every_document_ends_with_eod(mixed: BuiltData) -> None:
    tokenizer = Tokenizer.load(mixed.folder / "tokenizer.json")
    data = read_indexed(mixed.folder / "train")
    assert np.all(data.tokens[data.starts[1:] - 1] == tokenizer.eod)
    assert np.count_nonzero(data.tokens == tokenizer.eod) == len(data.starts) - 1


def test_second_build_does_nothing(builder: Builder, tmp_path: Path) -> None:
    corpus = write_texts(tmp_path / "corpus")
    first = builder(corpus)
    before = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    start = time.monotonic()
    second = builder(corpus)
    assert time.monotonic() - start < 2
    assert (first.built, second.built, second.folder) == (True, False, first.folder)
    assert second.manifest == first.manifest
    assert {path.name: path.stat().st_mtime_ns for path in second.folder.iterdir()} == before


def test_same_text_elsewhere_gives_the_same_bytes(builder: Builder, tmp_path: Path) -> None:
    first = builder(write_texts(tmp_path / "corpus"))
    shutil.copytree(tmp_path / "corpus", tmp_path / "moved" / "corpus")
    second = builder(tmp_path / "moved" / "corpus", out=tmp_path / "out2", cache=tmp_path / "cache2")
    assert second.folder.name == first.folder.name
    assert content(second.folder) == content(first.folder)


@pytest.mark.parametrize(
    "change", [{"vocab_size": 401}, {"max_mb": 0.9}, {"heldout_fraction": 0.2}, {"seed": 1}, {"name": "other"}]
)
def test_every_parameter_is_in_the_digest(builder: Builder, tmp_path: Path, change: dict[str, Any]) -> None:
    corpus = write_texts(tmp_path / "corpus", 5)
    one, two = builder(corpus), builder(corpus, **change)
    assert one.manifest["digest"] != two.manifest["digest"] and two.built


def test_changed_text_is_built_again(builder: Builder, tmp_path: Path) -> None:
    corpus = write_texts(tmp_path / "corpus", 5)
    first = builder(corpus)
    (corpus / "001.txt").write_text("something else")
    second = builder(corpus)
    assert second.built and second.folder != first.folder


def test_manifest_describes_the_files(mixed: BuiltData) -> None:
    manifests.verify(mixed.folder, manifests.load(mixed.folder))
    assert {path.name for path in mixed.folder.iterdir()} == {*manifests.FILES, *RECEIPTS, "manifest.json"}
    sources = json.loads((mixed.folder / "sources.json").read_text())
    splits = mixed.manifest["splits"]
    assert sum(row["documents"] for row in sources) == splits["train"]["documents"] + splits["heldout"]["documents"]
    assert sum(row["bytes"] for row in sources) == splits["train"]["bytes"] + splits["heldout"]["bytes"]


@pytest.mark.parametrize("name", (*manifests.FILES, *RECEIPTS))
def test_missing_or_truncated_file_is_named(mixed: BuiltData, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(mixed.folder, folder)
    with (folder / name).open("r+b") as file:
        file.truncate(3)
    with pytest.raises(DataError, match=rf"{name} has 3 bytes instead of \d+; delete"):
        manifests.load(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        manifests.load(folder)


def test_changed_byte_is_found_by_verify(mixed: BuiltData, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(mixed.folder, folder)
    with (folder / "train.bin").open("r+b") as file:
        file.write(b"\x01\x02\x03")
    with pytest.raises(DataError, match=r"train\.bin does not match its sha256"):
        manifests.verify(folder, manifests.load(folder))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_mb": 0}, r"data\.max_mb must be above 0"),
        ({"heldout_fraction": 0.0}, r"data\.heldout_fraction must lie"),
        ({"heldout_fraction": 1.0}, r"data\.heldout_fraction must lie"),
        ({"name": "a/b"}, r"data\.name 'a/b' cannot name a folder"),
        ({"vocab_size": 100}, r"A vocabulary of 100 is too small"),
    ],
)
def test_bad_parameter_is_named(builder: Builder, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        builder(write_texts(tmp_path / "corpus", 4), **change)
    assert not list((tmp_path / "out").glob("*")) or not list((tmp_path / "out").glob(".building*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_sentence_and_leaves_nothing(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(self: IndexedWriter, *arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(IndexedWriter, "add_many", full)
    with pytest.raises(OutputError, match=r"The disk is full while writing .*; free space"):
        builder(write_texts(tmp_path / "corpus", 4))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_output_that_is_a_file_is_named(builder: Builder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"Cannot write .*file"):
        builder(write_texts(tmp_path / "corpus", 4), out=tmp_path / "file")


def test_half_a_dataset_in_the_way_is_named(builder: Builder, tmp_path: Path) -> None:
    corpus = write_texts(tmp_path / "corpus", 4)
    folder = builder(corpus).folder
    (folder / "manifest.json").unlink()
    with pytest.raises(OutputError, match="exists but is not a whole dataset"):
        builder(corpus)


KILLED = """
import os, signal, sys
from pathlib import Path
from data_pipeline import build as module
from data_pipeline.build import build
from data_pipeline.options import Options
root, point = Path(sys.argv[1]), sys.argv[2]
owner, _, name = point.rpartition(".")
target = __import__(owner, fromlist=["x"])
real = getattr(target, name)
def killing(*args, **kwargs):
    if point.endswith("_fsync") and "manifest" not in str(args):
        return real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(target, name, killing)
build(root / "corpus", root / "out", Options("tiny", 400, 1.0, 0.1, max_bad_fraction=0.5), cache=root / "cache",
      log=lambda line: None)
"""


@pytest.mark.parametrize(
    "point",
    [
        "data_pipeline.sources.ingest.read_unit",
        "data_pipeline.pipeline.split_heldout",
        "data_pipeline.tokenise.learn.train_tokenizer",
        "data_pipeline.build.merge",
        "data_pipeline.manifest.seal",
        "data_pipeline.output._fsync",
    ],
)
def test_killed_build_leaves_no_dataset_and_the_next_is_identical(builder: Builder, tmp_path: Path, point: str) -> None:
    corpus = write_texts(tmp_path / "corpus", 12)
    reference = builder(corpus, out=tmp_path / "reference", cache=tmp_path / "other-cache")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), point], check=False)
    assert done.returncode == -signal.SIGKILL
    out = tmp_path / "out"
    assert not list(out.glob("tiny-*"))
    assert [path.name for path in out.glob(".building-*")]
    again = builder(corpus)
    assert again.built and content(again.folder) == content(reference.folder)
    assert not list(out.glob(".building-*"))


def test_two_builds_at_once_agree(tmp_path: Path) -> None:
    write_texts(tmp_path / "corpus", 12)
    code = KILLED.partition("root, point")[0] + (
        "root = Path(sys.argv[1])\n"
        'print(build(root / "corpus", root / "out", Options("tiny", 400, 1.0, 0.1, max_bad_fraction=0.5),'
        ' cache=root / "cache", log=lambda line: None).built)'
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate()[0].strip() for process in pair)
    assert [process.returncode for process in pair] == [0, 0]
    assert said == ["False", "True"]


def test_giant_single_line_is_a_corpus(builder: Builder, tmp_path: Path) -> None:
    """One line of several times the cap: cut into documents, capped, split."""
    (tmp_path / "line.txt").write_text("".join(f"word{i} " for i in range(300_000)))
    built = builder(tmp_path / "line.txt", max_mb=2.0)
    splits = built.manifest["splits"]
    assert 1e6 < splits["train"]["bytes"] + splits["heldout"]["bytes"] <= 2e6


def test_table_sums_up_the_tail() -> None:
    row = {"version": "1", "licence": "MIT", "documents": 1}
    lines = sources_table([{"name": f"s{i}", "bytes": i * 1_000_000, **row} for i in range(5)], limit=2)
    assert [line.split()[0] for line in lines] == ["source", "s4", "s3", "3", "total"]
    assert lines[3].endswith("3.00") and lines[4].endswith("10.00")
