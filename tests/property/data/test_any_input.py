"""Any bytes at all in a file of any kind: documents or quarantine, never an exception, and nothing is lost."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shards import Located
from data_pipeline.sources.base import Item, Quarantined, Reading
from data_pipeline.sources.entries import read_file

PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "data", "robot", None]) | VALUES, "content": st.text(max_size=9) | VALUES},
    optional={"protocol_tags": st.lists(st.sampled_from(["<tool:a>", "<role:user>", "<x>"]), max_size=3) | VALUES},
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "text": st.text(max_size=30) | VALUES,
        "messages": st.lists(MESSAGE, max_size=3) | VALUES,
        "source": VALUES,
        "timestamp": VALUES | st.sampled_from(["2024-01-02", "2024-01-02T03:04:05+01:00"]),
        "trust": VALUES,
        "policy": VALUES | st.fixed_dictionaries({}, optional={"allow_copy": VALUES, "ttl_s": VALUES}),
    },
)


def read(name: str, data: bytes, reading: Reading) -> list[Item]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        return list(read_file(Path(folder) / name, 3, reading))


@given(
    st.binary(max_size=300) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.html"]),
    st.integers(8, 400),
    st.integers(0, 400),
)
def test_arbitrary_bytes(data: bytes, name: str, part: int, cut: int) -> None:
    reading = Reading(part_bytes=part, max_line=100)
    found = read(name, data, reading)
    assert all(one.file == 3 and one.position >= 1 for one in found)
    for one in found:
        if isinstance(one, Located):
            assert one.document.size <= part
            one.document.parts[0].data.decode()
    if name == "a.txt":
        assert len(found) == 1 + reading.counts["cut_parts"]
        kept = sum(one.document.size for one in found if isinstance(one, Located))
        assert kept <= len(data) and (kept == len(data) or any(isinstance(one, Quarantined) for one in found))


@given(st.lists(ENTRY | VALUES, max_size=5), st.sampled_from(sorted(PACK)), st.integers(8, 40))
def test_arbitrary_entries(entries: list[Any], suffix: str, part: int) -> None:
    """One document or more, or one row of quarantine, for every line."""
    lines = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
    reading = Reading(part_bytes=part)
    found = read(f"a.jsonl{suffix}", PACK[suffix](lines), reading)
    assert {one.position for one in found} == set(range(1, len(entries) + 1))
    assert len(found) == len(entries) + reading.counts["cut_parts"]
    for position, entry in enumerate(entries, start=1):
        mine = [one.document for one in found if isinstance(one, Located) and one.position == position]
        if mine and not mine[0].framed:
            assert b"".join(one.parts[0].data for one in mine) == entry["text"].encode()


@settings(max_examples=40)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=30), st.integers(0, 10**9), st.integers(0, 255))
def test_a_flipped_byte_of_a_parquet_file(texts: list[str], place: int, value: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        pq.write_table(pa.table({"text": texts}), path, row_group_size=7)
        data = bytearray(path.read_bytes())
        data[place % len(data)] = value
        path.write_bytes(data)
        reading = Reading()
        found = list(read_file(path, 0, reading))
    assert [one.position for one in found] == list(range(1, len(found) + 1))
    assert len(found) >= len(texts) or isinstance(found[-1], Quarantined)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=20), st.sampled_from([".gz", ".zst"]), st.data())
def test_a_compressed_file_cut_anywhere(texts: list[bytes], suffix: str, draw: st.DataObject) -> None:
    """What is kept is a prefix of what was there; only a cut between two whole frames is not noticed."""
    lines = [b'{"text": "%s"}\n' % text.hex().encode() for text in texts]
    whole = PACK[suffix](b"".join(lines))
    cut = draw.draw(st.integers(1, len(whole) - 1))
    found = read(f"a.jsonl{suffix}", whole[:cut], Reading())
    kept = [one.document.parts[0].data for one in found if isinstance(one, Located)]
    assert kept == [text.hex().encode() for text in texts[: len(kept)]]
    assert [one.reason for one in found if isinstance(one, Quarantined)] == ["damaged-compression"]
