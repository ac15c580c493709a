"""Our files against megatron-core's own writer and reader, and our readers against damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.documents import Document, Part, plain
from data_pipeline.pack.indexed import IndexedWriter, read_indexed, token_dtype
from data_pipeline.pack.records import RecordWriter, read_records
from data_pipeline.tokenise.encode import encode_document
from refractor_megatron.errors import DataError
from refractor_megatron.tokenizer import Tokenizer, train_tokenizer

LENGTHS = [5, 1, 300, 17, 2]


def documents(vocab: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, length) for length in LENGTHS]


def write(prefix: Path, vocab: int) -> None:
    writer = IndexedWriter(prefix, vocab)
    for document in documents(vocab):
        writer.add(document)
    writer.close()


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # megatron-core 0.16 with numpy 2
@pytest.mark.parametrize("vocab", [300, 65_499, 65_500, 200_000])
def test_bytes_equal_megatron(tmp_path: Path, vocab: int) -> None:
    torch = pytest.importorskip("torch")
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    write(tmp_path / "ours", vocab)
    dtype = indexed_dataset.DType.optimal_dtype(vocab)
    assert dtype is token_dtype(vocab)
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents(vocab):
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / "ours"))
    assert [len(document) for document in theirs] == LENGTHS
    assert np.array_equal(theirs[2], documents(vocab)[2])


def test_indexed_reads_back(tmp_path: Path) -> None:
    write(tmp_path / "a", 1000)
    data = read_indexed(tmp_path / "a")
    assert np.array_equal(data.tokens, np.concatenate(documents(1000)))
    assert data.starts.tolist() == [0, *np.cumsum(LENGTHS).tolist()]


@pytest.mark.parametrize(
    ("suffix", "damage", "reason"),
    [
        (".bin", lambda raw: raw[:-2], r"a\.bin has \d+ bytes where its index needs"),
        (".bin", lambda raw: raw + b"x", r"a\.bin has \d+ bytes where its index needs"),
        (".idx", lambda raw: raw[:-1], r"a\.idx is truncated"),
        (".idx", lambda raw: raw[:10], r"a\.idx is truncated"),
        (".idx", lambda raw: b"X" + raw[1:], r"a\.idx is not an index"),
        (".idx", lambda raw: None, r"a\.idx \(No such file"),
        (".bin", lambda raw: None, r"a\.bin \(No such file"),
    ],
)
def test_damaged_index_is_named(tmp_path: Path, suffix: str, damage: object, reason: str) -> None:
    write(tmp_path / "a", 1000)
    damage_file(tmp_path / f"a{suffix}", damage)
    with pytest.raises(DataError, match=reason):
        read_indexed(tmp_path / "a")


def damage_file(path: Path, damage: object) -> None:
    changed = damage(path.read_bytes())  # type: ignore[operator]
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)


SPANS = [np.array([[3, 0, 5, 0]], np.int32), np.array([[2, 0, 1, 0], [4, 1, 3, 4]], np.int32)]


def write_records(prefix: Path) -> None:
    writer = RecordWriter(prefix)
    for spans in SPANS:
        writer.add(spans)
    writer.close()


def test_records_read_back(tmp_path: Path) -> None:
    write_records(tmp_path / "a")
    records = read_records(tmp_path / "a")
    assert np.array_equal(records.spans, np.concatenate(SPANS))
    assert records.first.tolist() == [0, 1, 3]
    assert records.starts.tolist() == [0, 3, 5, 9]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda raw: raw[:-1], "is truncated"),
        (lambda raw: raw[:20], "is not a record file"),
        (lambda raw: b"Y" + raw[1:], "is not a record file"),
        (lambda raw: raw[:8] + b"\x09" + raw[9:], "version 9, this code reads 1"),
        (lambda raw: raw[:-16] + b"\x07\0\0\0" + raw[-12:], "contradicts its own header"),
        (lambda raw: None, "No such file"),
    ],
)
def test_damaged_records_are_named(tmp_path: Path, damage: object, reason: str) -> None:
    write_records(tmp_path / "a")
    damage_file(tmp_path / "a.rec", damage)
    with pytest.raises(DataError, match=rf"a\.rec.*{reason}"):
        read_records(tmp_path / "a")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([b"some words, some more words"], 300)


def test_plain_document_is_text_and_end(tokenizer: Tokenizer) -> None:
    encoded = encode_document(tokenizer, plain(b"some words"))
    assert encoded.tokens.tolist() == [*tokenizer.encode(b"some words"), tokenizer.eod]
    assert encoded.spans.tolist() == [[len(encoded.tokens), 0, 5, 0]]


def test_conversation_is_framed_and_recorded(tokenizer: Tokenizer) -> None:
    parts = (Part(b"hi <|system|>", role=1), Part(b"", role=1), Part(b"word", role=3, segment=1, bits=4))
    encoded = encode_document(tokenizer, Document(parts, framed=True))
    user, tool, end = tokenizer.role_ids["user"], tokenizer.role_ids["tool"], tokenizer.end
    text, word = tokenizer.encode(b"hi <|system|>"), tokenizer.encode(b"word")
    assert encoded.tokens.tolist() == [user, *text, end, user, end, tool, *word, end, tokenizer.eod]
    assert encoded.spans.tolist() == [[len(text) + 4, 0, 1, 0], [len(word) + 2, 1, 3, 4], [1, 1, 5, 0]]
    assert tokenizer.role_ids["system"] not in encoded.tokens
