from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import manifest as manifests
from data_pipeline.build import BuiltData
from data_pipeline.identity import digest, parameters
from data_pipeline.options import Curriculum, Decontaminate, Filters, Mix, Options, Tasks
from data_pipeline.pack.indexed import IndexedWriter, read_indexed
from data_pipeline.tables import sources_table
from refractor_megatron.config import compose
from refractor_megatron.errors import ConfigError, DataError, OutputError
from refractor_megatron.tokenizer import Tokenizer
from refractor_megatron.training.data_options import options_of
from tests.unit.data_pipeline.corpora import TINY, Builder, write_texts

RECEIPTS = (
    "provenance.npy",
    "provenance-heldout.npy",
    "documents-train.parquet",
    "documents-heldout.parquet",
    "ledger.json",
    "audit.parquet",
    "quarantine.jsonl",
    "report.json",
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


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every option with its value, groups walked into."""
    found = []
    for item in fields(value):
        inner = getattr(value, item.name)
        found += leaves(inner, (*path, item.name)) if is_dataclass(inner) else [((*path, item.name), inner)]
    return found


def changed(options: Any, path: tuple[str, ...]) -> Any:
    """``options`` with another value of one option, of the same type."""
    if len(path) > 1:
        return replace(options, **{path[0]: changed(getattr(options, path[0]), path[1:])})
    value = getattr(options, path[0])
    other = {
        bool: lambda: not value, int: lambda: value + 1, float: lambda: value + 0.25, str: lambda: value + "x",
        tuple: lambda: (*value, "x"), type(None): lambda: ("x",),
    }[type(value)]()  # fmt: skip
    return replace(options, **{path[0]: other})


@pytest.mark.parametrize("path", [path for path, _ in leaves(TINY)], ids=".".join)
def test_every_option_is_in_the_digest_but_who_does_the_work(path: tuple[str, ...]) -> None:
    free = path[0] == "engine" or path == ("max_bad_fraction",)
    files = path == ("decontaminate", "files")  # their content is, and their place is not
    one, two = (digest(parameters(options, [], None), []) for options in (TINY, changed(TINY, path)))
    assert (one == two) == (free or files)


def test_options_and_the_command_line_agree_on_defaults() -> None:
    """But for the data set's name and size, and decontamination, which a user's own runs have on."""
    cfg = compose(["experiment=reference"])
    own = dict(leaves(options_of(cfg)))
    plain = dict(leaves(Options(cfg.data.name, cfg.model.vocab_size, cfg.data.max_mb, cfg.data.heldout_fraction)))
    assert {".".join(path) for path in own if own[path] != plain[path]} <= {"decontaminate.enabled", "dedup.enabled"}


def test_evaluation_files_count_by_content(builder: Builder, tmp_path: Path) -> None:
    corpus, held = tmp_path / "corpus", tmp_path / "held.txt"
    corpus.mkdir()
    for i in range(12):
        (corpus / f"{i}.txt").write_text(" ".join(f"word{i}x{j}" for j in range(40)))
    held.write_text("something else entirely")
    options: dict[str, Any] = {"decontaminate": Decontaminate(enabled=True, files=(str(held),))}
    first = builder(corpus, **options)
    held.write_text((corpus / "3.txt").read_text())
    second = builder(corpus, **options)
    assert second.built and (first.folder, second.manifest["counts"]["contaminated"]) != (second.folder, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"filters": Filters(rules_off=("x",))}, "is off; set data.filters.enabled=true"),
        ({"filters": Filters(enabled=True, rules_on=("no-rule",))}, "No quality rule is called 'no-rule'"),
        ({"filters": Filters(True, perplexity_low=60, perplexity_high=40)}, "must be below perplexity_high"),
        ({"decontaminate": Decontaminate(files=("a.txt",))}, "no effect without data.decontaminate.enabled"),
        ({"decontaminate": Decontaminate(True, files=("gone.txt",))}, "Cannot read the evaluation file gone.txt"),
        ({"tasks": Tasks(retrieval=0.1)}, "data.tasks.retrieval has no effect without stages"),
        ({"mix": Mix(temperature=2.0)}, "data.mix.temperature has no effect without stages"),
        ({"curriculum": Curriculum((64, 32))}, "must be positive and rise"),
    ],
)
def test_options_without_effect_or_sense_are_refused_before_any_work(
    builder: Builder, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=reason):
        builder(write_texts(tmp_path / "corpus", 4), **change)
    assert not (tmp_path / "cache").exists()


def test_text_that_edits_make_equal_is_on_one_side_once(builder: Builder, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(12):
        (corpus / f"{i}.txt").write_text(
            f"Note {i // 4} was sent by jane{i}@mailbox-provider.net to all of us today.\n"
        )
    built = builder(corpus, filters=Filters(pii="scrub"), heldout_fraction=0.3)
    train, heldout = texts_of(built.folder, "train"), texts_of(built.folder, "heldout")
    assert len({*train, *heldout}) == len(train) + len(heldout) == 3
    assert built.manifest["counts"]["equal after edits"] == 9
    assert all(b"<EMAIL>" in text for text in (*train, *heldout))


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
    with pytest.raises((ConfigError, DataError), match=reason):
        builder(write_texts(tmp_path / "corpus", 4), **change)
    assert not list((tmp_path / "out").glob("[!.]*")) and not list((tmp_path / "out").glob(".building*"))


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
