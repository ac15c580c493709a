"""The log survives kills, full disks, resumes and numbers that JSON lacks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from refractor_megatron.telemetry.sinks.jsonl import JsonlWriter, read_jsonl, rewind_jsonl


def _write(path: Path, *records: dict[str, object]) -> None:
    writer = JsonlWriter(path)
    for record in records:
        writer.write(record)
    writer.close()


def test_every_line_is_readable_before_close(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "m.jsonl")
    for step in (1, 2):
        writer.write({"step": step, "loss": 0.1 + step})
        assert [r["step"] for r in read_jsonl(tmp_path / "m.jsonl")] == list(range(1, step + 1))
    writer.close()


def test_floats_keep_all_bits_and_non_finite_ones_stay_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    _write(path, {"step": 1, "loss": 0.1 + 0.2, "bad": [math.nan, math.inf, -math.inf], "nested": {"x": math.nan}})
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    record = read_jsonl(path)[0]
    assert record["loss"] == 0.1 + 0.2
    assert math.isnan(record["bad"][0]) and record["bad"][1:] == [math.inf, -math.inf]


@pytest.mark.parametrize(
    "tail", [b'{"step":3,"lo', b'{"step":3,"loss":1.5}garbage', b'"text"\n', b"[1]\n", b'{"x":1}\n']
)
def test_torn_or_foreign_lines_are_ignored(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "m.jsonl"
    _write(path, {"step": 1}, {"step": 2})
    path.write_bytes(path.read_bytes() + tail)
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]


def test_the_last_record_of_a_step_wins(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    _write(path, {"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}, {"step": 1, "loss": 7.0})
    assert [(r["step"], r["loss"]) for r in read_jsonl(path)] == [(1, 7.0), (2, 8.0)]
    _write(path, {"step": 1, "weights": "raw"}, {"step": 1, "weights": "ema"})
    assert len(read_jsonl(path, ("step", "weights"))) == 2


def test_missing_file_is_an_empty_log(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "none.jsonl") == []
    assert rewind_jsonl(tmp_path / "none.jsonl", 3) == 0


def test_rewind_sets_later_steps_aside_and_cuts_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    _write(path, *({"step": step, "loss": 1 / step} for step in range(1, 6)))
    path.write_bytes(path.read_bytes() + b'{"step":6,"lo')
    assert rewind_jsonl(path, 3) == 2
    assert path.read_bytes().count(b"\n") == 3
    assert read_jsonl(path)[-1] == {"step": 3, "loss": 1 / 3}
    assert [r["step"] for r in read_jsonl(tmp_path / "m.superseded.jsonl")] == [4, 5]
    before = path.stat().st_ino
    assert rewind_jsonl(path, 3) == 0 and path.stat().st_ino == before, "nothing to do must not rewrite the file"


def test_appending_after_a_rewind_follows_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2')
    rewind_jsonl(path, 2)
    _write(path, {"step": 2})
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n'


def test_disk_full_is_an_oserror_and_leaves_nothing_to_flush() -> None:
    writer = JsonlWriter(Path("/dev/full"))
    with pytest.raises(OSError, match="space"):
        writer.write({"step": 1})
    writer.close()
