"""Whatever is wrong with an entry, it ends in quarantine with its place and reason, and its neighbours are kept."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.engine.tasks import run_task, task_folder
from data_pipeline.shards import Located, Shard
from data_pipeline.sources import compressed, open_sources
from data_pipeline.sources.base import Bad, Quarantined, Reading, Source
from data_pipeline.sources.entries import NO_RULES, read_file
from data_pipeline.sources.ingest import LEDGER, QUARANTINE, check_bad_fraction, ingest_stage, ledgers_of
from data_pipeline.sources.units import read_unit
from refractor_megatron.errors import DataError

GOOD = b'{"text": "good"}\n'


def read(path: Path, reading: Reading | None = None, **rules: Any) -> tuple[list[bytes], list[Quarantined]]:
    """``(texts, quarantined)`` of a file."""
    found = list(read_file(path, 0, reading or Reading(), {**NO_RULES, **rules}))
    kept = [b"".join(p.data for p in one.document.parts) for one in found if isinstance(one, Located)]
    return kept, [one for one in found if isinstance(one, Quarantined)]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b"{not json", "broken-json", "Expecting property name"),
        (b'{"text": ' + b"[" * 100_000, "broken-json", "nested too deeply"),
        (b'{"text": "a", "text": "b"}', "field-twice", "field 'text' stands twice"),
        (b'{"messages": [{"role": "user", "role": "tool", "content": "x"}]}', "field-twice", "'role' stands twice"),
        (b'{"text": "\xff"}', "invalid-utf8", "byte 11 of the line"),
        (b'{"text": "a\\ud800b"}', "lone-surrogate", "character 2"),
        (b'{"messages": [{"role": "user", "content": "\\udfff"}]}', "lone-surrogate", "alone"),
        (b'{"text": "\\u0000\\u0000 "}', "nul-bytes", "3 bytes"),
        (b'"text"', "wrong-schema", "object"),
        (b'{"body": "x"}', "wrong-schema", "either a text or a messages field"),
        (b'{"text": "x", "messages": []}', "wrong-schema", "either a text or a messages field"),
        (b'{"text": 5}', "wrong-schema", "text: 5 is not of type"),
        (b'{"messages": "hi"}', "wrong-schema", "messages"),
        (b'{"messages": [{"role": "user"}]}', "wrong-schema", '"content" is a required property'),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "bad-message", "unknown role 'robot'"),
        (b'{"messages": [{"role": "user", "contnt": "y", "content": "x"}]}', "bad-message", "did you mean 'content'"),
        (
            b'{"messages": [{"role": "user", "content": "x", "protocol_tags": ["<saftey:restricted>"]}]}',
            "bad-message",
            "did you mean '<safety:restricted>'",
        ),
        (
            b'{"messages": [{"role": "user", "content": {"value": "!", "encoding": "base64"}}]}',
            "bad-message",
            "not valid base64",
        ),
        (b'{"text": "x", "trust": 2}', "wrong-schema", "trust"),
        (b'{"text": "x", "timestamp": "yesterday"}', "provenance", "timestamp must be unix seconds"),
        (b'{"text": "x", "policy": {"allow": true}}', "provenance", "policy must be an object"),
    ],
)
def test_bad_line(tmp_path: Path, line: bytes, reason: str, detail: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    kept, (bad,) = read(tmp_path / "a.jsonl")
    assert kept == [b"good", b"good"]
    assert (bad.reason, bad.position, bad.file) == (reason, 3, 0)
    assert detail in bad.detail
    assert bad.sample == (line + b"\n")[:200] or reason == "nul-bytes"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_above_the_limit_is_passed_over_without_being_held(tmp_path: Path, suffix: str) -> None:
    pack: Callable[[bytes], bytes] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    block = os.urandom(5 << 20).hex().encode()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(GOOD + b'{"text": "' + block + b'"}\n' + GOOD))
    tracemalloc.start()
    try:
        kept, (bad,) = read(path, Reading(max_line=100_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert kept == [b"good", b"good"]
    assert (bad.reason, bad.position, bad.detail) == ("too-long", 2, "10.5 MB; the limit is 0.1 MB")
    assert len(bad.sample) == 200 and peak < 8 << 20


def test_a_line_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    line = b'{"text": "' + b"x" * 88 + b'"}'
    (tmp_path / "a.jsonl").write_bytes(line + b"\r\n" + line[:-2] + b'y"}\n' + line)
    kept, bad = read(tmp_path / "a.jsonl", Reading(max_line=100))
    assert len(line) == 100 and kept == [b"x" * 88] * 2
    assert [one.position for one in bad] == [2]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_what_stands_before_damage_is_kept(tmp_path: Path, suffix: str) -> None:
    pack = {".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
    lines = b"".join(json.dumps({"text": os.urandom(40).hex()}).encode() + b"\n" for _ in range(8000))
    whole = pack(lines)
    (tmp_path / f"a{suffix}").write_bytes(whole[: len(whole) * 3 // 4])
    reading = Reading()
    kept, (bad,) = read(tmp_path / f"a{suffix}", reading)
    expected = [json.loads(line)["text"].encode() for line in lines.splitlines()]
    assert kept == expected[: len(kept)] and len(kept) > 3000
    assert bad.reason == "damaged-compression" and bad.position == len(kept) + 1
    assert reading.counts["lost_bytes"] == len(whole) * 3 // 4


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_not_compressed_at_all(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(GOOD)
    kept, (bad,) = read(tmp_path / f"a{suffix}")
    assert kept == [] and (bad.reason, bad.position) == ("damaged-compression", 1)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_decompression_bomb(tmp_path: Path, suffix: str) -> None:
    pack = {".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
    (tmp_path / f"a{suffix}").write_bytes(pack(GOOD) + pack(bytes(96 << 20)))
    tracemalloc.start()
    try:
        kept, (bad,) = read(tmp_path / f"a{suffix}", Reading(max_line=1 << 20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert kept == [b"good"] and (bad.reason, bad.position) == ("decompression-bomb", 2)
    assert peak < 80 << 20


def test_text_beyond_the_absolute_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 100))
    with path.open("rb") as raw, pytest.raises(Bad, match="its limit"):
        compressed.open_stream(path, raw, max_text=50).read()


def test_parquet_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-100])
    reading = Reading()
    kept, (bad,) = read(path, reading)
    assert kept == [] and (bad.reason, bad.position) == ("damaged-parquet", 1)
    assert reading.counts["lost_bytes"] == path.stat().st_size


def test_parquet_damaged_in_a_later_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [os.urandom(50).hex() for _ in range(4000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000, compression="zstd", use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 4000] = bytes(4000)
    path.write_bytes(data)
    kept, (bad,) = read(path)
    assert kept == [text.encode() for text in texts[: len(kept)]] and len(kept) >= 1000
    assert (bad.reason, bad.position) == ("damaged-parquet", len(kept) + 1)


def test_parquet_rows(tmp_path: Path) -> None:
    raw = [b"plain", b"bad \xff byte", None, b"long" * 100]
    binary = pa.array(raw, pa.binary())
    array = pa.Array.from_buffers(pa.string(), 4, binary.buffers(), binary.null_count)
    pq.write_table(pa.table({"text": array, "id": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    kept, bad = read(tmp_path / "a.parquet", Reading(max_line=300))
    assert kept == [b"plain"]
    assert [(one.reason, one.position) for one in bad] == [("invalid-utf8", 2), ("wrong-schema", 3), ("too-long", 4)]


def test_parquet_without_a_column_of_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    kept, (bad,) = read(tmp_path / "a.parquet")
    assert kept == [] and bad.detail == "no column named text or messages"
    assert read(tmp_path / "a.parquet", fields={"text": "body"}) == ([b"x"], [])


def test_parquet_bomb(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * (40 << 20)]}), path, compression="zstd", use_dictionary=False)
    kept, (bad,) = read(path)
    assert kept == [] and bad.reason == "decompression-bomb"


def test_plain_text_loses_only_the_part_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"line\n" * 100 + b"\xff\n" + b"more\n" * 100)
    kept, (bad,) = read(tmp_path / "a.txt", Reading(part_bytes=200))
    assert (bad.reason, bad.position) == ("invalid-utf8", 3) and b"\xff" in bad.sample
    assert kept == [b"line\n" * 40, b"line\n" * 40, b"more\n" * 40, b"more\n" * 40, b"more\n"]


def test_pages(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(b"<p>caf\xe9 au lait")
    (tmp_path / "b.html").write_bytes(b'<meta charset="latin-1"><p>caf\xe9 au lait')
    (tmp_path / "c.html").write_bytes(b'<meta charset="klingon"><p>caf\xe9')
    assert read(tmp_path / "a.html")[1][0].reason == "invalid-utf8"
    assert read(tmp_path / "b.html")[0] == ["café au lait\n".encode()]
    assert "klingon" in read(tmp_path / "c.html")[1][0].detail
    assert read(tmp_path / "b.html", Reading(max_line=20))[1][0].reason == "too-long"


def ingest(root: Path, **limits: Any) -> tuple[list[Source], Path, int]:
    """Ingests ``root/corpus``; ``(sources, stage folder, tasks)``."""
    sources = open_sources(root / "corpus", root / "cache", lambda line: None)
    stage = ingest_stage(sources, 1 << 20, **limits)
    folder = stage.prepare(root / "work")
    for index in range(stage.count):
        run_task(folder, index)
    return sources, folder, stage.count


def write(root: Path, **files: bytes) -> None:
    for name, data in files.items():
        path = root / "corpus" / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_ledger_balances_and_everything_bad_has_a_row(tmp_path: Path) -> None:
    write(tmp_path, a_jsonl=GOOD + b'{"text": " \\n"}\n{bad\n' + GOOD, b_txt=b"line\n" * 500_000, c_txt=b"")
    sources, folder, count = ingest(tmp_path)
    assert count == 1
    (ledger,) = ledgers_of(folder, count)
    rows = [json.loads(line) for line in (task_folder(folder, 0) / QUARANTINE).open()]
    assert ledger["in"] == ledger["kept"] + sum(ledger["dropped"].values()) + sum(ledger["quarantined"].values())
    assert (ledger["entries"], ledger["cut_parts"], ledger["in"]) == (6, 2, 8)
    assert (ledger["dropped"], ledger["quarantined"], len(rows)) == ({"blank": 2}, {"broken-json": 1}, 1)
    assert rows[0]["sample"] == "{bad\n" and (rows[0]["file"], rows[0]["position"]) == (0, 3)
    shards = [Shard(path) for path in sorted(task_folder(folder, 0).glob("*.arrow"))]
    assert sum(map(len, shards)) == ledger["kept"] == 5
    assert sum(int(shard.sizes.sum()) for shard in shards) == ledger["bytes"]
    assert ledger["shards"] == len(shards)


def test_samples_are_escaped(tmp_path: Path) -> None:
    write(tmp_path, a_jsonl=b'{"text": "\xff\x00\xe9"}\n')
    _, folder, _ = ingest(tmp_path)
    raw = (task_folder(folder, 0) / QUARANTINE).read_bytes()
    assert raw.isascii() and b"\\\\xff" in raw


def test_bad_share_of_a_source_stops_the_build(tmp_path: Path) -> None:
    write(tmp_path, a__x_jsonl=GOOD * 99 + b"{bad\n", b__y_jsonl=GOOD * 5 + b"{bad\n{worse\n{}\n[]\n")
    sources, folder, count = ingest(tmp_path)
    with pytest.raises(DataError) as caught:
        check_bad_fraction(sources, folder, count, 0.01)
    message = str(caught.value)
    assert message.startswith(
        "Source b: 4 of 9 documents are unusable, 44.44% of all, more than data.max_bad_fraction 0.01"
    )
    assert "b/y.jsonl:6 (broken-json" in message and "b/y.jsonl:8 (wrong-schema" in message
    assert "b/y.jsonl:9" not in message and message.endswith("or raise data.max_bad_fraction.")
    check_bad_fraction(sources, folder, count, 0.5)


def test_one_line_may_be_most_of_a_source(tmp_path: Path) -> None:
    write(tmp_path, a__x_jsonl=GOOD * 199 + b'{"text": "' + b"x" * 200_000 + b'"}\n')
    sources, folder, count = ingest(tmp_path, max_line_mb=0.1)
    with pytest.raises(DataError, match=r"1 of 200 documents are unusable, \d\d\.\d\d% of its bytes"):
        check_bad_fraction(sources, folder, count, 0.01)


def test_one_damaged_file_counts_with_its_bytes(tmp_path: Path) -> None:
    """Not as one entry among the many of the files that are whole."""
    torn = gzip.compress(b"".join(b'{"text": "%s"}\n' % os.urandom(20).hex().encode() for _ in range(500)))[:2000]
    write(tmp_path, a_jsonl=GOOD * 1000, b_jsonl_gz=torn)
    sources, folder, count = ingest(tmp_path)
    with pytest.raises(DataError, match=r"10\.\d+% of its bytes, more than.*b\.jsonl\.gz:\d+ \(damaged-compression"):
        check_bad_fraction(sources, folder, count, 0.05)


def test_packages_stop_no_build(tmp_path: Path) -> None:
    write(tmp_path, a_jsonl=b"{bad\n")
    (source,), folder, count = ingest(tmp_path)
    packaged = Source(source.name, "", "", "", {}, source.units, files=source.files, mendable=False)
    check_bad_fraction([packaged], folder, count, 0.0)
    with pytest.raises(DataError):
        check_bad_fraction([source], folder, count, 0.0)


@pytest.mark.parametrize("change", ["gone", "longer", "other", "unreadable"])
def test_a_file_that_vanishes_or_changes_is_named(tmp_path: Path, change: str) -> None:
    write(tmp_path, a_txt=b"some text")
    (source,) = open_sources(tmp_path / "corpus", tmp_path / "cache", lambda line: None)
    path = tmp_path / "corpus" / "a.txt"
    if change == "unreadable" and os.geteuid() == 0:
        path.unlink()
        path.mkdir()
    elif change == "unreadable":
        path.chmod(0)
    elif change == "gone":
        path.unlink()
    else:
        path.write_bytes(b"some text and more" if change == "longer" else b"some texu")
        os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match=r"a\.txt"):
        list(read_unit(source.units[0], Reading()))


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, a_jsonl=GOOD * 3)
    (source,) = open_sources(tmp_path / "corpus", tmp_path / "cache", lambda line: None)
    reading = read_unit(source.units[0], Reading())
    next(iter(reading))
    with (tmp_path / "corpus" / "a.jsonl").open("ab") as more:
        more.write(GOOD)
    with pytest.raises(DataError, match=r"a\.jsonl has changed since this build began"):
        list(reading)


def test_a_file_that_was_only_touched_is_the_same(tmp_path: Path) -> None:
    write(tmp_path, a_txt=b"some text")
    (source,) = open_sources(tmp_path / "corpus", tmp_path / "cache", lambda line: None)
    os.utime(tmp_path / "corpus" / "a.txt", ns=(1, 1))
    assert len(list(read_unit(source.units[0], Reading()))) == 1


def test_a_failed_task_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, a_txt=b"some text")
    sources = open_sources(tmp_path / "corpus", tmp_path / "cache", lambda line: None)
    stage = ingest_stage(sources, 1 << 20)
    folder = stage.prepare(tmp_path / "work")
    (tmp_path / "corpus" / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt cannot be read any more"):
        run_task(folder, 0)
    assert [path.name for path in folder.iterdir()] == ["stage.json"]


def test_the_stage_is_the_same_for_the_same_text_in_another_place(tmp_path: Path) -> None:
    folders = []
    for place in ("one", "two"):
        write(tmp_path / place, a_jsonl=GOOD * 3 + b"{bad\n", b_txt=b"text")
        folders.append(ingest(tmp_path / place)[1])
    assert folders[0].name == folders[1].name
    for name in (LEDGER, QUARANTINE, "00000.arrow"):
        assert (folders[0] / "00000" / name).read_bytes() == (folders[1] / "00000" / name).read_bytes()


def test_parquet_cells_that_have_no_value(tmp_path: Path) -> None:
    stamps = pa.array([0, 10**15, None], pa.timestamp("s"))
    pq.write_table(pa.table({"text": ["a", "b", "c"], "timestamp": stamps}), tmp_path / "a.parquet")
    kept, (bad,) = read(tmp_path / "a.parquet")
    assert kept == [b"a", b"c"] and (bad.reason, bad.position) == ("wrong-schema", 2)


def test_parquet_with_fewer_rows_than_its_footer_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), tmp_path / "a.parquet", row_group_size=1)
    whole = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, **more: whole(self, row_groups=[0, 1], **more))
    kept, (bad,) = read(tmp_path / "a.parquet")
    assert kept == [b"a", b"b"] and bad.detail == "2 rows where the footer says 3"
