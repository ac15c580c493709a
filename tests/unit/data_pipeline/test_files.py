from __future__ import annotations

import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.documents import Document, plain
from data_pipeline.shards import Located
from data_pipeline.sources.base import Quarantined, Reading, grouped
from data_pipeline.sources.entries import NO_RULES, read_file, read_text
from data_pipeline.sources.files import file_sources
from data_pipeline.sources.fingerprint import Fingerprints
from data_pipeline.sources.units import read_unit
from refractor_megatron.errors import DataError
from tests.unit.data_pipeline.cutting import cut_text

LINES = [{"text": "first"}, {"text": "zweiter ü"}, {"messages": [{"role": "user", "content": "hi"}]}]


def items(path: Path) -> tuple[list[Document], list[Quarantined]]:
    found = list(read_file(path, 0, Reading()))
    return (
        [one.document for one in found if isinstance(one, Located)],
        [one for one in found if isinstance(one, Quarantined)],
    )


def documents(path: Path) -> list[Document]:
    """All documents of a file without faults."""
    found, bad = items(path)
    assert not bad
    return found


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


def test_parquet_conversations(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet")
    (found,) = documents(tmp_path / "a.parquet")
    assert [(part.role, part.data) for part in found.parts] == [(1, b"q"), (2, b"a")]


def test_text_is_kept_byte_for_byte(tmp_path: Path) -> None:
    data = "\ufeffcrlf\r\n\0é".encode()
    (tmp_path / "a.md").write_bytes(data)
    assert texts(documents(tmp_path / "a.md")) == [data]


def test_positions_are_lines_and_parts_of_a_line_share_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": "a"}]) + b"\n" + jsonl([{"text": "word " * 100}]))
    reading = Reading(part_bytes=200)
    found = list(read_file(tmp_path / "a.jsonl", 7, reading))
    assert [(one.file, one.position) for one in found] == [(7, 1), (7, 3), (7, 3), (7, 3)]
    assert reading.counts["cut_parts"] == 2


@pytest.mark.parametrize("rule", sorted(NO_RULES))
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.html"])
def test_no_rule_has_a_silent_default(tmp_path: Path, name: str, rule: str) -> None:
    if name == "a.parquet":
        pq.write_table(pa.table({"text": ["a"]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(jsonl(LINES[:1]))
    short = {key: value for key, value in NO_RULES.items() if key != rule}
    used = {"a.html": ("format", "html")}.get(name, ("format", "schema", "fields"))
    if rule in used:
        with pytest.raises(KeyError, match=rule):
            list(read_file(tmp_path / name, 0, Reading(), short))
    else:
        assert len(list(read_file(tmp_path / name, 0, Reading(), short))) == 1


LONG = "".join(f"line {i} of a long text\n" for i in range(40))
SHORT = "not cut"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ".txt", ".md", ".html"])
def test_parts_of_one_text_are_a_group(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    lines = [{"text": LONG}, {"text": SHORT}, {"text": LONG + "longer"}, LINES[2], {"text": "other " + LONG}]
    if suffix.startswith(".jsonl"):
        path.write_bytes((gzip.compress if suffix.endswith("gz") else bytes)(jsonl(lines)))
    elif suffix == ".parquet":
        pq.write_table(pa.table({"text": [line["text"] for line in lines if "text" in line]}), path)
    else:
        path.write_text(f"<pre>{LONG}</pre>" if suffix == ".html" else LONG)
    found = [one for one in read_file(path, 0, Reading(part_bytes=200)) if isinstance(one, Located)]
    groups: dict[bytes, list[Document]] = {}
    for one in found:
        groups.setdefault(one.group or one.document.key, []).append(one.document)
    assert all(group == parts[0].key for group, parts in groups.items())
    joined = [b"".join(part.data for one in parts for part in one.parts).decode() for parts in groups.values()]
    if suffix in (".txt", ".md", ".html"):
        assert joined == [LONG] and len(found) > 4
        return
    chat = [] if suffix == ".parquet" else ["hi"]
    # texts 1 and 3 begin alike, and so are one group
    assert joined == [LONG + LONG + "longer", SHORT, *chat, "other " + LONG]
    assert [one.group for one in found if one.document.parts[0].data in (SHORT.encode(), b"hi")] in ([None], [None] * 2)


def test_a_first_part_in_quarantine_still_names_the_group() -> None:
    data = b"\x80" * 10 + b"a" * 20 + b"b" * 20
    bad, *rest = read_text(io.BytesIO(data), 0, Reading(part_bytes=10))
    assert isinstance(bad, Quarantined) and len(rest) == 4
    assert {one.group for one in rest if isinstance(one, Located)} == {plain(data[:10]).key}


@pytest.mark.parametrize("unit", [b"x", "é".encode(), "日".encode(), "\U0001f600".encode(), b"line\n", b"\x80"])
def test_long_text_is_cut_at_characters(unit: bytes) -> None:
    data = unit * 1000
    reading = Reading(part_bytes=101)
    found = list(read_text(io.BytesIO(data), 0, reading))
    assert reading.counts["cut_parts"] == len(found) - 1
    parts = list(cut_text(data, 101))
    assert b"".join(parts) == data and max(map(len, parts)) <= 101
    if unit == b"\x80":
        assert [one.position for one in found] == list(range(1, len(parts) + 1))
        assert all(isinstance(one, Quarantined) and one.reason == "invalid-utf8" for one in found)
        return
    assert [one.document.parts[0].data for one in found if isinstance(one, Located)] == parts


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
    (unit,) = source.units
    assert list(read_unit(json.loads(json.dumps(unit)), Reading())) == [Located(plain(b"text"), 0, 1)]
    assert source.files == ({"path": "book.txt", "sha256": hashlib.sha256(b"text").hexdigest(), "bytes": 4},)


@pytest.mark.parametrize("limit", [1, 5, 100])
def test_units_hold_every_file_once_and_no_more_than_they_should(limit: int) -> None:
    sizes = [3, 0, 9, 1, 1, 1, 4, 7]
    runs = list(grouped(sizes, limit))
    assert [place for run in runs for place in run] == list(range(len(sizes)))
    assert all(len(run) == 1 or sum(sizes[i] for i in run) <= limit for run in runs)


def test_units_are_the_same_in_another_place(tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text("text")
    first, second = (file_sources(tmp_path / place, Fingerprints(tmp_path))[0].units[0] for place in ("one", "two"))
    assert first["place"] != second["place"]
    assert {**first, "place": None} == {**second, "place": None}


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
        items(tmp_path / "corpus" / "gone.txt")
