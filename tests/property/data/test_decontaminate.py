"""Shares of evaluation text against a twin made of sets of word tuples."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.filters.decontaminate import EvaluationSet, overlap, search

_N, _MOST = 3, 2
_TEXTS = st.lists(st.sampled_from(["ab", "cd", "ef", "gh", "ij"]), min_size=1, max_size=14)
_MANY = st.lists(_TEXTS, min_size=1, max_size=7)


def _grams(words: list[str]) -> list[tuple[str, ...]]:
    """All n-grams; of a shorter text the text itself."""
    return [tuple(words[i : i + _N]) for i in range(len(words) - _N + 1)] or [tuple(words)]


def _expected(texts: list[list[str]], items: list[list[str]]) -> list[tuple[float, float, int]]:
    """Overlap, coverage and most covered item of each text, from the definition."""
    counts = Counter(gram for item in items for gram in set(_grams(item)))
    counted = [{gram for gram in _grams(item) if counts[gram] <= _MOST} for item in items]
    every = set().union(*counted)
    results = []
    for text in texts:
        grams = _grams(text)
        covered = [
            (-len(one & set(grams)) / max(len(one), 1), -len(one & set(grams)), k) for k, one in enumerate(counted)
        ]
        share, hits, place = min(covered)
        results.append((sum(gram in every for gram in grams) / len(grams), -share, place if hits else -1))
    return results


@settings(max_examples=100, deadline=None)
@given(_MANY, _MANY, st.booleans())
def test_shares_are_those_of_the_twin(texts: list[list[str]], items: list[list[str]], turned: bool) -> None:
    named = [(f"item {place}", ", ".join(item).encode()) for place, item in enumerate(items)]
    evaluation = EvaluationSet.build(named[::-1] if turned else named, _N, _MOST)
    assert evaluation.names == tuple(name for name, _ in named)
    data = [" ".join(text).upper().encode() for text in texts]
    flat = np.frombuffer(b"".join(data), np.uint8)
    offsets = np.append(0, np.cumsum([len(one) for one in data])).astype(np.int64)
    found, expected = search(flat, offsets, evaluation), _expected(texts, items)
    np.testing.assert_allclose(found.overlap, [one[0] for one in expected], rtol=1e-6)
    np.testing.assert_allclose(found.coverage, [one[1] for one in expected], rtol=1e-6)
    assert found.item.tolist() == [one[2] for one in expected]
    assert np.array_equal(overlap(flat, offsets, evaluation), found.overlap)
    assert np.array_equal(found.score, np.maximum(found.overlap, found.coverage))
