"""A labelled fixture: precision of what is retrieved, and what each predicate of the guard does to it."""

from __future__ import annotations

import math

import numpy as np

from data_pipeline.provenance import FOREVER
from data_pipeline.retrieval.guard import Guard
from data_pipeline.retrieval.neighbours import Neighbours
from data_pipeline.retrieval.precision import Precision, precision_at_k
from tests.unit.data_pipeline.retrieval.indexes import NOW, encoded_index

TOPICS, CHUNK, VOCABULARY = 6, 32, 5000


def test_counts_by_hand() -> None:
    ids = np.array([[3, 1, -1], [2, 5, 7], [-1, -1, -1]])
    found = precision_at_k(ids, [{3}, {5, 7, 9}, {0}])
    assert found == Precision(hits=3, returned=5, answered=2, queries=3) and found.value == 0.6
    assert math.isnan(precision_at_k(ids[2:], [{0}]).value)


def test_the_guard_keeps_what_is_relevant() -> None:
    """Each topic has words of its own among common ones, and five records that are alike: two good, one expired, one of
    low trust, one from a source not allowed. There are as many distractors of common words."""
    rng = np.random.default_rng(0)
    words = rng.integers(100, VOCABULARY, (TOPICS, 8))

    def about(topic: int) -> list[int]:
        return np.where(rng.random(CHUNK) < 0.9, rng.choice(words[topic], CHUNK), rng.integers(0, 100, CHUNK)).tolist()

    kinds = ["good", "good", "expired", "doubtful", "elsewhere"] * TOPICS + ["distractor"] * 5 * TOPICS
    topics = [i // 5 for i in range(5 * TOPICS)]
    chunks = [about(t) for t in topics] + rng.integers(0, 100, (5 * TOPICS, CHUNK)).tolist()
    index = encoded_index(
        chunks,
        512,
        sources=("web", "wiki"),
        source=[int(kind == "elsewhere") for kind in kinds],
        timestamp=[NOW - 5000 if kind == "expired" else NOW for kind in kinds],
        trust=[0.2 if kind == "doubtful" else 0.9 for kind in kinds],
    )
    queries = np.array([about(t) for t in range(TOPICS)])
    same = np.zeros_like(queries)
    relevant = [{5 * t, 5 * t + 1} for t in range(TOPICS)]

    def retrieve(guard: Guard, fan_in: int) -> tuple[Precision, dict[str, int]]:
        neighbours = Neighbours(index, guard, fan_in)
        ids = neighbours.found_with(queries, same, None)
        return precision_at_k(ids, relevant), neighbours.take_counts().rejected

    unguarded, rejected = retrieve(Guard(-1.0, FOREVER, 0.0), 5)
    assert unguarded == Precision(2 * TOPICS, 5 * TOPICS, TOPICS, TOPICS) and not any(rejected.values())
    guarded, rejected = retrieve(Guard(0.3, 3600, 0.6, ("web",)), 5)
    assert guarded == Precision(2 * TOPICS, 2 * TOPICS, TOPICS, TOPICS) and guarded.value == 1.0
    searched = 20 * TOPICS
    assert rejected == {
        "own_document": 0, "similarity": searched - 5 * TOPICS, "age": TOPICS, "source": TOPICS, "trust": TOPICS,
    }  # fmt: skip
