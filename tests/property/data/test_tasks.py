"""Made tasks: choices, shares and cuts against naive twins; long-range tasks of any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.pack.indexed import Indexed
from data_pipeline.tasks import plants
from data_pipeline.tasks.compose import share_beyond
from data_pipeline.tasks.keyed import Draws
from data_pipeline.tasks.long_range import LEAST_SHARE, LongRangeTasks, possible
from data_pipeline.tasks.text import Vocabulary, _without_specials, read_text
from tests.unit.data_pipeline.tasks.drafts import write_draft


@given(st.integers(0, 2**63), st.text(), st.integers(1, 50))
def test_draws_are_a_function_of_the_key_and_within_bounds(seed: int, name: str, n: int) -> None:
    one, two = Draws(seed, name), Draws(seed, name)
    drawn = [one.below(n) for _ in range(20)]
    assert drawn == [two.below(n) for _ in range(20)] and all(0 <= value < n for value in drawn)
    assert sorted(one.shuffled(range(n))) == list(range(n))
    assert n < 20 or drawn != [Draws(seed, name, 1).below(n) for _ in range(20)]


def test_draws_are_even() -> None:
    draws = Draws("even")
    counts = np.bincount([draws.below(7) for _ in range(14_000)], minlength=7)
    places = np.array([draws.shuffled(range(5)).index(0) for _ in range(5_000)])
    assert counts.min() > 1_800 and counts.max() < 2_200  # expected 2 000, standard deviation 41
    assert np.bincount(places, minlength=5).min() > 850  # 1 000, 28


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=8), st.integers(0, 500), st.integers(1, 500)
)
def test_share_is_what_counting_tokens_gives(stretches: list[tuple[int, int]], answer: int, window: int) -> None:
    evidence = [(start, start + length) for start, length in stretches]
    tokens = [token for start, stop in evidence for token in range(start, stop)]
    local = range(answer - window, answer)  # the window of the query that predicts the answer's first token
    beyond = [token for token in tokens if token < local.start]
    assert share_beyond(evidence, answer, window) == (len(beyond) / len(tokens) if tokens else 0.0)


_SPECIAL = 10  # ids from here on
_plain = st.lists(st.integers(0, _SPECIAL - 1), max_size=8).map(lambda ids: [*ids, _SPECIAL])
_framed = st.lists(st.lists(st.integers(0, _SPECIAL - 1), max_size=5), min_size=1, max_size=4).map(
    lambda messages: [*(t for ids in messages for t in (_SPECIAL + 1, *ids, _SPECIAL + 2)), _SPECIAL]
)


@given(st.lists(st.one_of(_plain, _framed), min_size=1, max_size=6))
def test_runs_of_text_are_the_stretches_between_special_tokens(documents: list[list[int]]) -> None:
    tokens = np.array([token for one in documents for token in one])
    starts = np.cumsum([0, *map(len, documents)])
    low, high = _without_specials(Indexed(tokens, starts), starts[:-1], starts[1:], _SPECIAL)
    ordinary = np.concatenate([[False], tokens < _SPECIAL, [False]]).astype(int)
    step = np.diff(ordinary)
    assert low.tolist() == np.flatnonzero(step == 1).tolist() and high.tolist() == np.flatnonzero(step == -1).tolist()


@given(st.sampled_from([plants.needle, plants.hops, plants.recall]), st.integers(0, 10**6), st.integers(1, 40))
def test_planted_lines_are_all_different(form: Callable[..., plants.Planted], seed: int, lines: int) -> None:
    planted = form(Draws(seed), lines)
    everything = planted.asked + planted.others
    assert len(set(everything)) == len(everything)
    for value in planted.answer.split(", "):
        assert [value in line for line in everything].count(True) == 1
        assert any(value in line for line in planted.asked) and value not in planted.question
    assert all(any(name in line for line in planted.asked) for name in planted.names)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(text, vocabulary) of a small dataset."""
    folder: Path = tmp_path_factory.mktemp("draft")
    vocabulary = Vocabulary(write_draft(folder))
    return read_text(folder, "train", vocabulary), vocabulary


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1500), st.integers(257, 6000), st.integers(0, 10**6))
def test_long_range_tasks_of_any_size(text: Any, window: int, capacity: int, seed: int) -> None:
    if not possible(capacity, window):
        return
    tasks = LongRangeTasks(*text, window, seed)
    stage = tasks.of_stage(capacity - 1, capacity)
    made = [next(stage) for _ in range(8)]
    assert sum(one is None for one in made) == tasks.rejected.total()
    for one in made:
        if one is not None:
            assert len(one.tokens) == capacity == one.spans[:, 0].sum()
            assert share_beyond(one.evidence, one.answer[0], window) > LEAST_SHARE
            assert one.answer[1] == capacity - 2
    if capacity > window + 1200:
        assert any(one is not None for one in made)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_cut_moves_back_to_a_line_or_a_word(text: Any, data: st.DataObject) -> None:
    runs, vocabulary = text
    run = data.draw(st.integers(0, len(runs.start) - 1))
    tokens = runs.tokens(int(runs.start[run]), int(runs.stop[run]))
    at = data.draw(st.integers(0, len(tokens) - 1))
    cut = vocabulary.boundary(tokens, at)
    assert 0 <= cut <= at
    before, after = vocabulary.decode(tokens[:cut]), vocabulary.decode(tokens[cut:])
    assert not before or before.endswith(b"\n") or after[:1].isspace()
