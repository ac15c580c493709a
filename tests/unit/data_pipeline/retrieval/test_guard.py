"""The guard's predicates one by one, and ties of the search."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_pipeline.provenance import FOREVER
from data_pipeline.retrieval.guard import PREDICATES, Guard, RetrievalCounts
from data_pipeline.retrieval.index import Candidates, RetrievalIndex
from refractor_megatron.errors import DataError
from tests.unit.data_pipeline.retrieval.indexes import NOW, index_of

OPEN = Guard(sigma_min=-1.0, t_max_s=FOREVER, trust_min=0.0)


def candidates(similarity: Any, ids: Any, own: int = 0) -> Candidates:
    rows = np.atleast_2d(np.asarray(similarity, dtype=np.float32))
    return Candidates(rows, np.atleast_2d(np.asarray(ids, dtype=np.int32)), np.full(len(rows), own))


def test_ties_go_to_the_lower_id() -> None:
    index = index_of([[1, 0], [0, 1], [1, 0], [1, 0]])
    assert index.search(np.array([[1.0, 0.0]], dtype=np.float32), 2).ids.tolist() == [[0, 2]]


@pytest.fixture
def mixed_records() -> RetrievalIndex:
    """Record 0 is good; each of 1 to 5 fails at least one of the guards below."""
    return index_of(
        np.eye(6),
        ("web", "wiki"),
        source=[0, 0, 0, 1, 0, 1],
        timestamp=[NOW, NOW - 101, NOW - 100, NOW, NOW, NOW - 1000],
        trust=[1.0, 1.0, 0.6, 1.0, 0.59, 0.1],
        ttl_s=[FOREVER, FOREVER, 99, FOREVER, FOREVER, FOREVER],
    )


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"sigma_min": 0.5}, [0, 1, 2]),  # the bound itself passes
        ({"sigma_min": 1.1}, []),
        ({"t_max_s": 100}, [0, 3, 4]),  # 2 has outlived its own lifetime
        ({"t_max_s": 0}, [0, 3, 4]),
        ({"sources": ("web",)}, [0, 1, 2, 4]),
        ({"sources": ("wiki", "web")}, [0, 1, 2, 3, 4, 5]),
        ({"sources": ()}, []),
        ({"trust_min": 0.6}, [0, 1, 2, 3]),  # float32(0.6) is not below 0.6
        ({"sigma_min": 0.2, "t_max_s": 500, "sources": ("web",), "trust_min": 0.6}, [0, 1]),
    ],
)
def test_each_predicate(mixed_records: RetrievalIndex, change: dict[str, Any], kept: list[int]) -> None:
    settings: dict[str, Any] = {"sigma_min": -1.0, "t_max_s": FOREVER, "trust_min": 0.0, **change}
    found = candidates([0.9, 0.6, 0.5, 0.4, 0.3, 0.2], range(6))
    passes, rejected = Guard(**settings).apply(found, mixed_records, NOW)
    if "t_max_s" not in change:  # the lifetime of record 2 always counts
        kept = [i for i in kept if i != 2]
    assert np.flatnonzero(passes[0]).tolist() == kept
    assert rejected.sum() == 6 - len(kept)


def test_a_record_counts_once_under_its_first_reason(mixed_records: RetrievalIndex) -> None:
    """Record 5 fails everything, 4 trust alone, 3 the source, 2 its lifetime, 1 its age."""
    found = candidates([0.9, 0.9, 0.9, 0.9, 0.9, 0.1], range(6), own=7)
    passes, rejected = Guard(0.45, 100, 0.6, ("web",)).apply(found, mixed_records, NOW)
    assert passes.tolist() == [[True, False, False, False, False, False]]
    assert dict(zip(PREDICATES, rejected.tolist(), strict=True)) == {
        "own_document": 7, "similarity": 1, "age": 2, "source": 1, "trust": 1,
    }  # fmt: skip


def test_the_present_is_an_argument(mixed_records: RetrievalIndex) -> None:
    guard = Guard(-1.0, 100, 0.0)
    kept = {now: guard.apply(candidates([0.9], [0]), mixed_records, now)[0].item() for now in (NOW + 100, NOW + 101)}
    assert kept == {NOW + 100: True, NOW + 101: False}


def test_not_a_number_is_too_small(mixed_records: RetrievalIndex) -> None:
    passes, rejected = OPEN.apply(candidates([np.nan, 0.9], [0, 1]), mixed_records, NOW)
    assert passes.tolist() == [[False, True]] and rejected.tolist() == [0, 1, 0, 0, 0]


def test_trust_that_is_not_a_number_is_too_small() -> None:
    _, rejected = OPEN.apply(candidates([0.9], [0]), index_of(np.eye(1), trust=np.nan), NOW)
    assert rejected.tolist() == [0, 0, 0, 0, 1]


def test_absent_candidates_are_neither_kept_nor_counted(mixed_records: RetrievalIndex) -> None:
    found = candidates([0.9, -np.inf, -np.inf], [0, -1, -1])
    passes, rejected = OPEN.apply(found, mixed_records, NOW)
    assert passes.tolist() == [[True, False, False]] and not rejected.any()


def test_unknown_source_is_named(mixed_records: RetrievalIndex) -> None:
    with pytest.raises(DataError, match=r"no record is from 'blog'; the sources are web, wiki\."):
        Guard(0.0, 1, 0.0, ("web", "blog")).check(mixed_records)


def test_counts_add_up_and_bin() -> None:
    found = candidates([1.0004, 0.9, 0.05, -0.3, np.nan, -np.inf], [0, 1, 2, 3, 4, -1])
    ids = np.array([[0, 1, -1]], dtype=np.int32)
    once = RetrievalCounts.of(np.array([1, 2, 3, 4, 5]), ids, found)
    assert once.histogram == [3, 0, 0, 0, 0, 0, 0, 0, 0, 2] and (once.kept, once.queries) == (2, 1)
    twice = (RetrievalCounts.none() + once + once).summary()
    assert twice["kept_per_chunk"] == 2.0 and sum(twice["similarity"]) == 10
    assert twice["rejected"] == dict(zip(PREDICATES, [2, 4, 6, 8, 10], strict=True))
