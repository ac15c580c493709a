"""Evaluation text in training documents: reading it, finding it, dropping what holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline.documents import plain
from data_pipeline.filters.audit import read_audit
from data_pipeline.filters.decontaminate import (
    EvaluationSet,
    decontaminate_task,
    evaluation_task,
    file_items,
    search,
)
from data_pipeline.shards import Located, Shard, write_shard
from refractor_megatron.errors import DataError


def _words(start: int, count: int) -> str:
    """Distinct made-up words."""
    return " ".join("w" + "".join(chr(97 + int(digit)) for digit in f"{i:06d}") for i in range(start, start + count))


def _search(text: str, *items: str) -> tuple[float, float, int]:
    evaluation = EvaluationSet.build((f"{place:02d}", item.encode()) for place, item in enumerate(items))
    data = np.frombuffer(text.encode(), np.uint8)
    found = search(data, np.array([0, len(data)], np.int64), evaluation)
    return float(found.overlap[0]), float(found.coverage[0]), int(found.item[0])


def test_a_question_inside_a_long_page_is_covered() -> None:
    share, covered, item = _search(_words(0, 500) + " " + _words(9000, 40), _words(7000, 40), _words(9000, 40))
    assert (covered, item) == (1.0, 1)
    assert share == pytest.approx(28 / 528, rel=1e-6)


def test_part_of_a_long_text_overlaps_wholly() -> None:
    share, covered, item = _search(_words(100, 50), _words(0, 1000))
    assert (share, item) == (1.0, 0)
    assert covered == pytest.approx(38 / 988, rel=1e-6)


def test_case_punctuation_and_white_space_hide_nothing() -> None:
    assert _search(_words(0, 30).upper().replace(" ", ",\n "), _words(0, 30))[:2] == (1.0, 1.0)


def test_text_without_spaces_is_compared_by_characters() -> None:
    text = "吾輩は猫である名前はまだ無いどこで生れたかとんと見当がつかぬ何でも薄暗いじめじめした所で"
    assert _search(text, text)[:2] == (1.0, 1.0)
    assert _search(text, text[::-1])[:2] == (0.0, 0.0)


def test_twelve_words_in_common_are_nothing() -> None:
    assert _search(_words(0, 12) + " " + _words(500, 20), _words(0, 12) + " " + _words(900, 20)) == (0.0, 0.0, -1)


def test_boilerplate_of_many_items_counts_as_found_nowhere() -> None:
    licence = _words(0, 60)
    few = [licence + " " + _words(1000 * k, 30) for k in range(1, 11)]
    assert _search(licence, *few)[0] == 1.0
    many = [*few, licence + " " + _words(20000, 30)]
    assert _search(licence, *many) == (0.0, 0.0, -1)
    share, covered, item = _search(licence + " " + _words(3000, 30), *many)
    assert (covered, item) == (1.0, 2) and share == pytest.approx(30 / 78, rel=1e-6)


def test_a_short_item_is_found_where_it_is_all() -> None:
    assert _search("Yes, of course.", "yes of course")[:2] == (1.0, 1.0)
    assert _search("Yes, of course we do.", "yes of course")[:2] == (0.0, 0.0)


def test_items_of_files(tmp_path: Path) -> None:
    lines = [
        {"text": "one"},
        {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "three"}]},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "b.txt").write_text("\nfirst\nparagraph\n \n\nsecond")
    assert list(file_items(tmp_path / "a.jsonl")) == [("a.jsonl:1", b"one"), ("a.jsonl:3", b"twothree")]
    assert list(file_items(tmp_path / "b.txt")) == [("b.txt:2", b"first\nparagraph\n"), ("b.txt:6", b"second")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "x", "neither .jsonl nor .txt"),
        ("a.jsonl", '{"text": "x"}\n{"question": "y"}', "a.jsonl:2: needs a field text"),
        ("a.jsonl", '{"text": 3}', "a.jsonl:1: needs a field text"),
        ("a.jsonl", "{", "a.jsonl:1: no valid JSON"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "a.jsonl:1, message 1"),
        ("gone.txt", None, "Cannot read the evaluation file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=says):
        list(file_items(tmp_path / name))


def _shard(path: Path, texts: list[str]) -> str:
    write_shard(path, 3, "made", [Located(plain(text.encode()), 0, k + 1) for k, text in enumerate(texts)])
    return str(path)


def _mask(path: Path, values: list[bool]) -> str:
    np.save(path, np.array(values))
    return str(path)


@pytest.fixture
def stage(tmp_path: Path) -> dict[str, Any]:
    """Document 2 of the first shard is held out; of the second, document 1 quotes it and 0 a user's question."""
    (tmp_path / "questions.txt").write_text(_words(9000, 40) + "\n\n" + _words(9500, 40))
    shards = [
        _shard(tmp_path / "0.arrow", [_words(0, 80), _words(100, 80), _words(200, 80)]),
        _shard(tmp_path / "1.arrow", [_words(300, 500) + " " + _words(9500, 40), _words(200, 60), _words(400, 80), ""]),
    ]
    heldout = [[False, False, True], [False] * 4]
    return {
        "shards": shards,
        "heldout": [_mask(tmp_path / f"held{k}.npy", mask) for k, mask in enumerate(heldout)],
        "train": [_mask(tmp_path / f"train{k}.npy", [not one for one in mask]) for k, mask in enumerate(heldout)],
        "files": [str(tmp_path / "questions.txt")],
        "ngram": 13,
        "threshold": 0.5,
        "evaluation": str(tmp_path / "evaluation"),
    }


def test_training_documents_that_hold_evaluation_text_are_dropped(stage: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    evaluation_task(stage, 0, tmp_path / "evaluation")
    rows, kept = [], []
    for index in (0, 1):
        out = tmp_path / f"out{index}"
        out.mkdir()
        decontaminate_task(stage, index, out)
        kept.append(np.load(out / "keep.npy").tolist())
        rows += read_audit(out / "audit.parquet")
        assert pq.read_table(out / "overlap.parquet").num_rows == len(Shard(Path(stage["shards"][index])))
    assert kept == [[True, True, False], [False, False, True, True]]
    ids = [one.tobytes().hex() for one in Shard(Path(stage["shards"][1])).ids]
    held = Shard(Path(stage["shards"][0])).ids[2].tobytes().hex()
    assert [(row.id, row.source, row.action, row.filter, row.rule) for row in rows] == [
        (one, 3, "drop", "decontaminate", "evaluation-overlap/1") for one in ids[:2]
    ]
    assert [row.score for row in rows] == [1.0, 1.0] and {row.threshold for row in rows} == {0.5}
    assert rows[0].detail == "1.000 of evaluation item questions.txt:3, 0.053 of the document"
    assert rows[1].detail == f"0.706 of evaluation item {held}, 1.000 of the document"


def test_nothing_to_evaluate_drops_nothing(stage: dict[str, Any], tmp_path: Path) -> None:
    stage["files"], stage["heldout"] = [], [_mask(tmp_path / f"none{k}.npy", [False] * n) for k, n in enumerate((3, 4))]
    (tmp_path / "evaluation").mkdir()
    evaluation_task(stage, 0, tmp_path / "evaluation")
    out = tmp_path / "out"
    out.mkdir()
    decontaminate_task({**stage, "threshold": 0.0}, 1, out)
    assert np.load(out / "keep.npy").all() and read_audit(out / "audit.parquet") == []
