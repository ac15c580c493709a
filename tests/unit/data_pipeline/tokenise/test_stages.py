"""The encode task against ``encode_document``, and the merge against the plain writers and megatron-core's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.documents import Document, Part, plain
from data_pipeline.pack.indexed import IndexedWriter, read_indexed, token_dtype
from data_pipeline.pack.records import RecordWriter, read_records
from data_pipeline.shards import Located, write_shard
from data_pipeline.tokenise.encode import Encoded, encode_document
from data_pipeline.tokenise.merge import merge
from data_pipeline.tokenise.stages import DOCUMENTS, SPAN_COUNTS, SPANS, TOKENS, encode_task
from refractor_megatron.distinction.roles import ROLES
from refractor_megatron.tokenizer import Tokenizer, train_tokenizer

TOKENIZER = train_tokenizer([b"some words and other words, over and over; words 123"] * 4, 320)

texts = st.one_of(st.text(max_size=30).map(str.encode), st.binary(max_size=12))
parts = st.builds(Part, texts, st.integers(0, len(ROLES) - 1), st.integers(0, 2), st.integers(0, 3))
conversations = st.lists(parts, min_size=1, max_size=5).map(lambda many: Document(tuple(many), framed=True))
documents = st.lists(st.one_of(texts.map(plain), conversations), max_size=8)


def encode(folder: Path, shards: list[list[Document]]) -> list[Path]:
    """Writes the shards and runs a task for each; the tasks' folders."""
    folder.mkdir(exist_ok=True)
    file = folder.parent / "tokenizer.json"  # shared, so that the process keeps its encoder
    if not file.exists():
        TOKENIZER.save(file)
    paths = [folder / f"{i}.arrow" for i in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        write_shard(path, 0, "test", [Located(document, 0, i + 1) for i, document in enumerate(shard)])
    params = {"shards": [str(path) for path in paths], "tokenizer": str(file)}
    outs = [folder / f"{i:05d}" for i in range(len(shards))]
    for i, out in enumerate(outs):
        out.mkdir()
        encode_task(params, i, out)
    return outs


def rows(out: Path) -> list[Encoded]:
    """What a task wrote, document by document."""
    tokens = np.fromfile(out / TOKENS, dtype=token_dtype(TOKENIZER.vocab_size)).astype(np.int64)
    spans = np.fromfile(out / SPANS, dtype=np.int32).reshape(-1, 4)
    token_cuts, span_cuts = np.cumsum(np.load(out / DOCUMENTS)), np.cumsum(np.load(out / SPAN_COUNTS))
    if not len(token_cuts):
        assert not len(tokens)
        assert not len(spans)
        return []
    pairs = zip(np.split(tokens, token_cuts)[:-1], np.split(spans, span_cuts)[:-1], strict=True)
    return [Encoded(t, s, 0) for t, s in pairs]


@settings(max_examples=60, deadline=None)
@given(documents)
def test_rows_are_what_encode_document_gives(tmp_path_factory: pytest.TempPathFactory, shard: list[Document]) -> None:
    (out,) = encode(tmp_path_factory.mktemp("encode"), [shard])
    found = rows(out)
    assert len(found) == len(shard)
    for row, document in zip(found, shard, strict=True):
        wanted = encode_document(TOKENIZER, document)
        assert row.tokens.tolist() == wanted.tokens.tolist()
        assert row.spans.tolist() == wanted.spans.tolist()


def some_shards() -> list[list[Document]]:
    rng = np.random.default_rng(0)
    words = [b"some ", b"words ", b"\xe6\x97\xa5", b"123 ", b"\xff"]

    def text() -> bytes:
        return b"".join(words[i] for i in rng.integers(0, len(words), rng.integers(0, 60)))

    def document(i: int) -> Document:
        if i % 3:
            return plain(text())
        return Document(tuple(Part(text(), i % len(ROLES), k, k) for k in range(1 + i % 4)), framed=True)

    return [[document(i) for i in range(n)] for n in (17, 1, 0, 30)]


def some_order(shards: list[list[Document]]) -> np.ndarray:
    """All documents but a few, mixed; with stretches in the order of their shard."""
    every = np.array([(s, r) for s, shard in enumerate(shards) for r in range(len(shard))])
    mixed = every[np.random.default_rng(1).permutation(len(every))]
    return np.concatenate([every[5:12], mixed[~(mixed[:, None] == every[5:12]).all(-1).any(-1)][:-3]])


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_merge_is_the_plain_writers_document_by_document(tmp_path: Path, block: int) -> None:
    shards = some_shards()
    order = some_order(shards)
    merged = merge(encode(tmp_path / "e", shards), order, tmp_path / "ours", TOKENIZER.vocab_size, block)
    tokens, records = IndexedWriter(tmp_path / "plain", TOKENIZER.vocab_size), RecordWriter(tmp_path / "plain")
    for shard, row in order.tolist():
        one = encode_document(TOKENIZER, shards[shard][row])
        tokens.add(one.tokens)
        records.add(one.spans)
    assert merged.sha256 == tokens.close()
    assert merged.spans == records.close()
    for suffix in (".bin", ".idx", ".rec"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"plain{suffix}").read_bytes()
    assert merged.documents == len(order) == len(read_indexed(tmp_path / "ours").starts) - 1
    assert merged.tokens == len(read_indexed(tmp_path / "ours").tokens) == read_records(tmp_path / "ours").starts[-1]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("ours")) == [
        "ours.bin",
        "ours.idx",
        "ours.rec",
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # megatron-core 0.16 with numpy 2
def test_merged_bytes_equal_megatron(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    shards = some_shards()
    order = some_order(shards)
    merge(encode(tmp_path / "e", shards), order, tmp_path / "ours", TOKENIZER.vocab_size, 500)
    dtype = indexed_dataset.DType.optimal_dtype(TOKENIZER.vocab_size)
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for shard, row in order.tolist():
        ids = encode_document(TOKENIZER, shards[shard][row]).tokens
        builder.add_document(torch.from_numpy(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.tokenise.merge._OPEN_FILES", 2)
    shards = [[plain(b"%d %d" % (s, r)) for r in range(3)] for s in range(5)]
    order = np.array([(s, r) for r in range(3) for s in (4, 0, 3, 1, 2)])
    merge(encode(tmp_path / "e", shards), order, tmp_path / "ours", TOKENIZER.vocab_size)
    data = read_indexed(tmp_path / "ours")
    texts = [
        TOKENIZER.decode(data.tokens[a:b].tolist()) for a, b in zip(data.starts[:-1], data.starts[1:], strict=True)
    ]
    assert texts == [b"%d %d" % (s, r) for s, r in order.tolist()]


def test_an_empty_order(tmp_path: Path) -> None:
    merged = merge(encode(tmp_path / "e", some_shards()), np.empty((0, 2), np.int64), tmp_path / "none", 320)
    assert (merged.documents, merged.tokens, merged.spans) == (0, 0, 0)
    assert (tmp_path / "none.bin").stat().st_size == 0


def test_the_encoder_follows_the_tokenizer_file(tmp_path: Path) -> None:
    """Workers keep their encoder between tasks; another file at the same path is another tokenizer."""
    shard = [plain(b"some words and other words")]
    first = rows(encode(tmp_path / "a", [shard])[0])[0].tokens
    single = Tokenizer([bytes([b]) for b in range(256)])
    (tmp_path / "tokenizer.json").unlink()
    single.save(tmp_path / "tokenizer.json")
    out = tmp_path / "again"
    out.mkdir()
    encode_task({"shards": [str(tmp_path / "a" / "0.arrow")], "tokenizer": str(tmp_path / "tokenizer.json")}, 0, out)
    again = np.fromfile(out / TOKENS, dtype=np.uint16)
    assert again[:-1].tolist() == list(shard[0].parts[0].data)
    assert len(again) > len(first)


def test_records_without_close_leave_nothing(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "a") as records:
        records.add(np.array([[3, 0, 0, 0]], dtype=np.int32))
    assert list(tmp_path.iterdir()) == []
