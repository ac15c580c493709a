from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.documents import Document, cut_text, plain
from data_pipeline.sources.base import Reading
from data_pipeline.sources.files import file_sources, read_file, read_text
from data_pipeline.sources.fingerprint import Fingerprints
from refractor_megatron.errors import DataError

LINES = [{"text": "first"}, {"text": "zweiter ü"}, {"messages": [{"role": "user", "content": "hi"}]}]


def documents(path: Path) -> list[Document]:
    return list(read_file(path, Reading()))


def texts(found: list[Document]) -> list[bytes]:
    return [b"|".join(part.data for part in one.parts) for one in found]


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines_of_every_compression(tmp_path: Path, suffix: str) -> None:
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack(jsonl(LINES)))
    found = documents(path)
    assert texts(found) == [b"first", "zweiter ü".encode(), b"hi"]
    assert [one.framed for one in found] == [False, False, True]


def test_zst_of_several_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(jsonl(LINES[:1])) + zstandard.compress(jsonl(LINES[1:2])))
    assert len(documents(path)) == 2


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_truncated_compression_is_an_error(tmp_path: Path, suffix: str) -> None:
    pack = {".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack(jsonl([{"text": f"line {i * i}"} for i in range(2000)]))[:-30])
    with pytest.raises(DataError, match=rf"a{suffix}:\d+: damaged compression"):
        documents(path)


def test_wrong_compression_is_an_error(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(jsonl(LINES))
        with pytest.raises(DataError, match=f"{name}:1: damaged compression"):
            documents(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{not json", "not valid JSON"),
        (
            b'{"messages": [{"role": "user", "role": "tool", "content": "x"}]}',
            "field 'role' stands twice in one object",
        ),
        (b'{"text": ' + b"[" * 100_000, "values are nested too deeply"),
        (b'{"text": "\xff"}', "not valid JSON"),
        (b'"text"', "either a text or a messages field"),
        (b'{"body": "x"}', "either a text or a messages field"),
        (b'{"text": "x", "messages": []}', "either a text or a messages field"),
        (b'{"text": 5}', "text must be a string, not int"),
        (b'{"messages": "hi"}', "messages must be a list"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{reason}"):
        documents(path)


def test_lone_surrogate_in_json_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n')
    reading = Reading()
    assert texts(list(read_file(path, reading))) == [b"a\xed\xa0\x80b"]
    assert reading.counts["invalid_utf8"] == 1


def test_parquet_text_keeps_invalid_utf8(tmp_path: Path) -> None:
    raw = [b"plain", b"bad \xff byte"]
    array = pa.Array.from_buffers(pa.string(), 2, pa.array(raw, pa.binary()).buffers())
    pq.write_table(pa.table({"text": array, "id": [1, 2]}), tmp_path / "a.parquet")
    assert texts(documents(tmp_path / "a.parquet")) == raw


def test_parquet_conversations(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet")
    (found,) = documents(tmp_path / "a.parquet")
    assert [(part.role, part.data) for part in found.parts] == [(1, b"q"), (2, b"a")]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [({"body": ["x"]}, "no column named text or messages"), ({"text": ["ok", None]}, "row 2: .*text or a messages")],
)
def test_bad_parquet_is_named(tmp_path: Path, columns: dict[str, list[Any]], reason: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet: {reason}"):
        documents(tmp_path / "a.parquet")


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"a\.parquet: unreadable Parquet after row 0"):
        documents(tmp_path / "a.parquet")


def test_text_is_kept_byte_for_byte(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbfcrlf\r\n\x00\xff"
    (tmp_path / "a.md").write_bytes(data)
    reading = Reading()
    assert texts(list(read_file(tmp_path / "a.md", reading))) == [data]
    assert reading.counts["invalid_utf8"] == 1


@pytest.mark.parametrize("unit", [b"x", "é".encode(), "日".encode(), "\U0001f600".encode(), b"line\n", b"\x80"])
def test_long_text_is_cut_at_characters(unit: bytes) -> None:
    data = unit * 1000
    reading = Reading(part_bytes=101)
    parts = texts(list(read_text(io.BytesIO(data), reading)))
    assert b"".join(parts) == data
    assert max(map(len, parts)) <= 101
    assert reading.counts["cut"] == len(parts) - 1
    if unit != b"\x80":
        assert all(part.decode() for part in parts)
    assert list(cut_text(data, 101)) == parts


def test_sources_are_the_first_level(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for name in ("loose.txt", "b/one.md", "b/deep/two.rst", "c/chat.jsonl", "c/.hidden.txt", ".git/x.txt", "c/code.py"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text(name)
    sources = file_sources(corpus, Fingerprints(tmp_path))
    assert [(s.name, sorted(s.identity)) for s in sources] == [
        ("b", ["b/deep/two.rst", "b/one.md"]),
        ("c", ["c/chat.jsonl"]),
        ("corpus", ["loose.txt"]),
    ]


def test_single_file_corpus(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("text")
    (source,) = file_sources(tmp_path / "book.txt", Fingerprints(tmp_path))
    assert list(source.read(Reading())) == [plain(b"text")]


@pytest.mark.parametrize(
    ("name", "reason"), [("missing", "does not exist"), ("empty", "holds no .txt"), ("x.pdf", "is none of .txt")]
)
def test_unusable_corpus_is_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pdf").touch()
    with pytest.raises(DataError, match=f"{name} {reason}"):
        file_sources(tmp_path / name, Fingerprints(tmp_path))


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.txt \(No such file"):
        file_sources(tmp_path / "corpus", Fingerprints(tmp_path))
    with pytest.raises(DataError, match=r"gone\.txt \(No such file"):
        documents(tmp_path / "corpus" / "gone.txt")
