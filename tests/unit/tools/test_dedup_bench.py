"""The oracle and the planted edits of ``tools/dedup_bench.py``; what ``tools/data_build_bench.py`` makes and draws."""

from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SETS = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=14), max_size=14)


def naive(sets: list[set[int]], threshold: float) -> list[tuple[int, int, float]]:
    pairs = itertools.combinations(range(len(sets)), 2)
    scored = [(a, b, len(sets[a] & sets[b]) / len(sets[a] | sets[b])) for a, b in pairs]
    return [one for one in scored if one[2] >= threshold]


def found(documents: list[list[int]], threshold: float) -> list[tuple[int, int, float]]:
    import dedup_truth  # type: ignore[import-not-found]

    hashes = np.array([token for one in documents for token in one], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    starts = np.cumsum([0, *map(len, documents)])
    pairs, scores = dedup_truth.all_pairs(*dedup_truth.token_sets(hashes, starts), threshold)
    return [(int(a), int(b), float(score)) for (a, b), score in zip(pairs, scores, strict=True)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=SETS, threshold=st.sampled_from([0.2, 0.5, 2 / 3, 0.7, 0.8, 1.0]))
def test_truth_is_that_of_brute_force(tools: None, documents: list[list[int]], threshold: float) -> None:
    assert found(documents, threshold) == naive([set(one) for one in documents], threshold)


def test_truth_on_documents_that_resemble_each_other(tools: None) -> None:
    random.seed(7)
    base = [[random.randrange(4000) for _ in range(random.randrange(5, 200))] for _ in range(60)]
    near = [[random.choice([token, random.randrange(4000)]) if random.random() < 0.2 else token for token in one]
            for one in base for _ in range(3)]  # fmt: skip
    documents = base + near
    truth = naive([set(one) for one in documents], 0.5)
    assert len(truth) > 200 and found(documents, 0.5) == truth


def test_planted_edits_change_the_stated_share_of_words(tools: None) -> None:
    import dedup_bench  # type: ignore[import-not-found]

    text = " ".join(f"w{i}" for i in range(2000)).encode()
    random_state = np.random.default_rng(1)
    assert dedup_bench.edited(text, 0.0, [b"x"], random_state) == text
    words = dedup_bench.edited(text, 0.08, [b"x"], random_state).split()
    lost = set(text.split()) - set(words)
    assert 60 <= len(lost) <= 160 and 20 <= words.count(b"x") <= 160  # of 160 edits a third each


@pytest.mark.parametrize("index", [0.5, 0.8, 1.0])
def test_predicted_chance_of_a_candidate(tools: None, index: float) -> None:
    import dedup_quality  # type: ignore[import-not-found]

    assert dedup_quality.chance(index, 16, 8) == pytest.approx(1 - (1 - index**8) ** 16)


@pytest.mark.parametrize("text", ["one two  three\nfour\n" * 20, "日本語の文章をここに置く。\n" * 9 + "in English too"])
def test_moved_text_has_the_same_units_elsewhere(tools: None, text: str) -> None:
    import data_build_text  # type: ignore[import-not-found]

    moved = data_build_text.moved(text, 1, 5)
    assert data_build_text.moved(text, 0, 5) == text != moved == data_build_text.moved(text, 1, 5)
    assert data_build_text.moved(text, 2, 5) != moved and sorted(moved) == sorted(text)
    assert re.findall(r"\s+", moved) == re.findall(r"\s+", text)


def test_instants_lie_in_order_within_the_stretch_that_they_follow(tools: None) -> None:
    import data_build_bench  # type: ignore[import-not-found]

    times = [10.0, 10.5, 13.0, 13.1, 20.0]
    events = [{"t": t, "event": "done" if t == 20.0 else "stage"} for t in times]
    drawn = data_build_bench.instants(events, np.random.default_rng(0), 200)
    assert [said for said, _ in drawn] == sorted(said for said, _ in drawn)
    assert {said for said, _ in drawn} == {1, 2, 3, 4}
    assert all(0 <= delay <= times[said] - times[said - 1] for said, delay in drawn)
