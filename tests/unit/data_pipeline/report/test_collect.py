"""What is taken down for the report while a dataset is built."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.build import BuiltData
from data_pipeline.filters.audit import read_audit
from data_pipeline.report.collect import CLOSEST, CLUSTERS, DROPPED, FILE, histogram
from data_pipeline.report.compare import marked
from data_pipeline.report.excerpts import LONE_BYTES, PAIR_BYTES, _start
from data_pipeline.report.html import visible


@pytest.fixture(scope="module")
def collected(everything: BuiltData) -> dict[str, Any]:
    return dict(json.loads((everything.folder / FILE).read_bytes()))


def test_histograms_hold_every_document(everything: BuiltData, collected: dict[str, Any]) -> None:
    chain = json.loads((everything.folder / "ledger.json").read_bytes())
    assert collected["documents"] == chain[0]["kept"]
    filtered = sum(next(step for step in chain if step["name"] == "filters")["dropped"].values())
    quality = collected["histograms"]["quality"]["counts"]
    assert sum(quality["filtered"]) == filtered and sum(quality["kept"]) == chain[-1]["kept"]
    for name, found in collected["histograms"].items():
        total = sum(sum(counts) for counts in found["counts"].values()) + found["unknown"]
        assert total == collected["documents"], name


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=80),
    st.booleans(),
)
def test_a_histogram_loses_nothing(values: list[float], logarithmic: bool) -> None:
    column = np.array(values, dtype=np.float64)
    half = np.arange(len(column)) % 2 == 0
    found = histogram(column, {"a": half, "b": ~half}, logarithmic)
    known = np.isfinite(column) & ((column > 0) | (not logarithmic))
    assert found["unknown"] == len(column) - known.sum()
    counted = {name: sum(counts) for name, counts in found["counts"].items()}
    assert counted == ({"a": (known & half).sum(), "b": (known & ~half).sum()} if known.any() else {})
    json.dumps(found, allow_nan=False)


def test_examples_are_those_of_the_audit(everything: BuiltData, collected: dict[str, Any]) -> None:
    audit = {(row.rule, row.id): row for row in read_audit(everything.folder / "audit.parquet")}
    assert collected["dropped"]
    for rule, examples in collected["dropped"].items():
        ids = sorted(identity for name, identity in audit if name == rule)
        assert [one["id"] for one in examples] == ids[:DROPPED]
        for one in examples:
            row = audit[rule, one["id"]]
            assert (one["score"], one["threshold"]) == (row.score, row.threshold)
            assert len(one["text"].encode()) <= LONE_BYTES


def test_groups_are_those_of_the_audit(everything: BuiltData, collected: dict[str, Any]) -> None:
    audit = read_audit(everything.folder / "audit.parquet")
    rows = [row for row in audit if row.filter.endswith("duplicate")]  # equal documents of a source have one id
    duplicates = collected["duplicates"]
    assert 0 < len(duplicates["clusters"]) <= CLUSTERS and 0 < len(duplicates["closest"]) <= CLOSEST
    assert sum(one["size"] for one in duplicates["clusters"]) == len(rows) == sum(duplicates["counts"].values())
    assert sum(one["documents"] for one in duplicates["pairs"]) == len(rows)
    for one in [*duplicates["clusters"], *duplicates["closest"]]:
        same = [row for row in rows if row.id == one["member"]["id"]]
        assert any(row.detail.startswith(f"survivor={one['survivor']['id']}") for row in same)
        assert all(len(one[side]["text"].encode()) <= PAIR_BYTES for side in ("survivor", "member"))
        if one["member"]["kind"] == "near":
            assert one["member"]["jaccard"] in [row.score for row in same]
    for one in duplicates["clusters"]:  # beside the survivor stands the member least like it
        mine = [row for row in rows if row.detail.startswith(f"survivor={one['survivor']['id']}")]
        assert one["size"] == len(mine)
        assert one["member"]["jaccard"] == min(row.score or 0.0 for row in mine)
    scores = [one["member"]["jaccard"] for one in duplicates["closest"]]
    near = sorted(row.score or 0.0 for row in rows if row.filter == "near-duplicate")
    assert scores == sorted(scores) and scores[0] == near[0]


def test_rules_that_are_off_say_what_they_would_drop(collected: dict[str, Any]) -> None:
    rules = {row["name"]: row for row in collected["rules"]}
    assert rules["loose-word-count/1"]["on"] and not rules["gopher-word-count/1"]["on"]
    assert rules["gopher-word-count/1"]["fails"] > rules["loose-word-count/1"]["fails"] > 0


def test_nothing_of_this_machine_is_in_it(everything: BuiltData) -> None:
    assert str(everything.folder.parent.parent) not in (everything.folder / FILE).read_text()


@given(st.text(max_size=200), st.text(max_size=200))
def test_marks_take_nothing_away(one: str, other: str) -> None:
    left, right = marked(one, other)
    assert html.unescape(re.sub("</?del>", "", left)) == visible(one)
    assert html.unescape(re.sub("</?ins>", "", right)) == visible(other)
    if one == other:
        assert "<del>" not in left and "<ins>" not in right


@given(st.binary(max_size=400), st.binary(min_size=1, max_size=50), st.binary(min_size=1, max_size=50))
def test_an_excerpt_starts_before_the_first_difference(common: bytes, one: bytes, other: bytes) -> None:
    common *= 4
    a, b = common + one, common + other
    start = _start(a, b)
    first = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert 0 <= start <= first and first - start <= 2 * 240
    assert a[:start] == b[:start]
