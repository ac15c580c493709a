"""Building, reading and refusing an index."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import manifest as manifests
from data_pipeline.build import BuiltData
from data_pipeline.pack.indexed import read_indexed
from data_pipeline.retrieval.build import build_index
from data_pipeline.retrieval.encoder import PAD
from data_pipeline.retrieval.index import INDEX, RetrievalIndex
from refractor_megatron.errors import DataError, OutputError
from refractor_megatron.tokenizer import Tokenizer
from tests.unit.data_pipeline.corpora import Builder, conversation, write_texts

CHUNK, DIM = 16, 32


def quiet(folder: Path, chunk: int = CHUNK, dim: int = DIM) -> tuple[Path, RetrievalIndex]:
    return build_index(folder, chunk, dim, log=lambda line: None)


@pytest.fixture
def folder(mixed: BuiltData, tmp_path: Path) -> Path:
    """A dataset of its own for a test."""
    return Path(shutil.copytree(mixed.folder, tmp_path / "data"))


def texts(folder: Path, index: RetrievalIndex) -> list[bytes]:
    tokenizer, tokens = Tokenizer.load(folder / "tokenizer.json"), read_indexed(folder / "train").tokens
    return [tokenizer.decode(tokens[r["start"] : r["start"] + r["length"]].tolist()) for r in index.records]


def test_records_are_chunks_of_single_documents(folder: Path) -> None:
    _, index = quiet(folder)
    data = read_indexed(folder / "train")
    records = index.records
    stop = records["start"] + records["length"]
    assert (data.starts[records["document"]] <= records["start"]).all()
    assert (stop <= data.starts[records["document"] + 1]).all()
    assert (np.diff(records["start"]) >= records["length"][:-1]).all()  # in order, none twice
    assert records["length"].max() == CHUNK and records["length"].min() >= CHUNK / 4
    plain = [d for d in range(len(data.starts) - 1) if b"helper" not in texts_of_document(folder, d)]
    covered = np.bincount(records["document"], weights=records["length"], minlength=len(data.starts) - 1)
    left_out = np.diff(data.starts) - covered
    assert plain and all(left_out[d] < CHUNK / 4 for d in plain)


def texts_of_document(folder: Path, number: int) -> bytes:
    data = read_indexed(folder / "train")
    tokens = data.tokens[data.starts[number] : data.starts[number + 1]].tolist()
    return Tokenizer.load(folder / "tokenizer.json").decode(tokens)


def test_vectors_are_the_encoded_records(folder: Path) -> None:
    _, index = quiet(folder)
    tokens = read_indexed(folder / "train").tokens
    for number in (0, len(index.records) // 2, len(index.records) - 1):
        start, length = index.records[number]["start"], index.records[number]["length"]
        chunk = np.full((1, CHUNK), PAD, dtype=np.int32)
        chunk[0, :length] = tokens[start : start + length]
        assert np.array_equal(index.encoder.encode(chunk)[0], index.vectors[number])


def test_what_the_rules_protect_is_not_indexed(folder: Path) -> None:
    """Conversations hold roles other than data, tool output and a restricted message tagged as retrieval context."""
    _, index = quiet(folder)
    found = b"\n".join(texts(folder, index))
    assert all(word not in found for word in (b"secret", b"helper", b"Add 2", b"Next."))


def test_tagged_context_is_indexed(builder: Builder, tmp_path: Path) -> None:
    corpus = write_texts(tmp_path / "corpus", 4)
    note = "a note about amber lanterns that burn all night long without any oil"
    for i in range(8):
        entry = conversation(i)
        entry["messages"].append({"role": "user", "content": f"{i} {note}", "protocol_tags": ["<retrieval:context>"]})
        (corpus / f"chat{i}.jsonl").write_text(json.dumps(entry) + "\n")
    folder = builder(corpus).folder
    found = b"\n".join(texts(folder, quiet(folder, chunk=64)[1]))
    assert b"amber lanterns" in found and b"secret" not in found and b"helper" not in found


def test_second_build_does_nothing_and_settings_make_another(folder: Path) -> None:
    first, index = quiet(folder)
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    again, same = quiet(folder)
    assert again == first and {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    assert same.digest == index.digest and np.array_equal(same.vectors, index.vectors)
    others = {quiet(folder, chunk=8)[1].digest, quiet(folder, dim=16)[1].digest, index.digest}
    assert len(others) == 3
    manifests.verify(folder, manifests.load(folder))  # the dataset itself is as it was


def test_same_dataset_elsewhere_gives_the_same_bytes(folder: Path, mixed: BuiltData, tmp_path: Path) -> None:
    first, index = quiet(folder)
    other = Path(shutil.copytree(mixed.folder, tmp_path / "other"))
    second, same = quiet(other)
    assert (first.name, index.digest) == (second.name, same.digest)
    assert all((first / p.name).read_bytes() == p.read_bytes() for p in second.iterdir())


@pytest.mark.parametrize("name", INDEX.files)
def test_torn_or_altered_file_is_refused(folder: Path, name: str) -> None:
    place, _ = quiet(folder)
    whole = (place / name).read_bytes()
    (place / name).write_bytes(whole[:-1])
    for read in (lambda: RetrievalIndex.load(place), lambda: quiet(folder)):
        with pytest.raises(DataError, match=rf"{name} has \d+ bytes instead of \d+; delete .*retrieval-"):
            read()
    (place / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"{name} does not match its sha256"):
        quiet(folder)
    (place / name).write_bytes(b"?" * len(whole))
    with pytest.raises(DataError, match=rf"{name} is damaged"):
        RetrievalIndex.load(place)
    (place / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        RetrievalIndex.load(place)


def test_no_index_and_a_newer_one_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match="is no retrieval index"):
        RetrievalIndex.load(folder / "nowhere")
    place, _ = quiet(folder)
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps(manifest | {"version": 3}))
    with pytest.raises(DataError, match="retrieval index format version 3, this code reads 1 to 2"):
        RetrievalIndex.load(place)


def test_killed_build_leaves_nothing_in_the_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.retrieval.build.HashingEncoder.encode", killed)
        with pytest.raises(KeyboardInterrupt):
            quiet(folder)
    assert not list(folder.glob("retrieval-*"))
    assert len(quiet(folder)[1].records)


def test_full_disk_is_one_sentence_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data_pipeline.retrieval.build.HashingEncoder.encode", full)
    with pytest.raises(OutputError, match=r"The disk is full while writing .*; free space"):
        quiet(folder)
    assert not list(folder.glob("retrieval-*")) and not list(folder.glob(".building-*"))


def test_dataset_without_provenance_is_named(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["provenance.npy"], manifest["merkle_root"]
    manifest["version"] = 1  # of the builds that had none
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "provenance.npy").unlink()
    manifests.load(folder)  # still good for training without retrieval
    with pytest.raises(DataError, match=r"has no provenance\.npy: it is of an older build"):
        quiet(folder)


def test_nothing_to_retrieve_is_named(builder: Builder, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "chat.jsonl").write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(9)))
    with pytest.raises(DataError, match="has no text to retrieve"):
        quiet(builder(corpus).folder)


def test_chunk_beyond_exact_sums_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"relation\.retrieval\.chunk=8193 is more than an index can hold"):
        quiet(folder, chunk=8193)


def test_provenance_reaches_the_records(builder: Builder, tmp_path: Path) -> None:
    corpus = write_texts(tmp_path / "corpus" / "texts", 9).parent
    text = "words of record {} that are many enough to fill one chunk of the index with some to spare"
    lines = [{"text": text.format(i), "source": "wire", "timestamp": 1000 + i, "trust": 0.5} for i in range(20)]
    (corpus / "news.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = builder(corpus).folder
    _, index = quiet(folder)
    assert index.sources == ("texts", "wire")
    wire = index.records[index.records["source"] == 1]
    rest = index.records[index.records["source"] == 0]
    assert set(wire["trust"]) == {0.5} and set(rest["trust"]) == {1.0}
    assert index.as_of == wire["timestamp"].max() > 1000 and set(rest["timestamp"]) == {index.as_of}
