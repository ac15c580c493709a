from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.selection import in_order, split_heldout, under_cap, water_level


def keys_of(count: int, start: int = 0) -> npt.NDArray[np.uint8]:
    digests = (hashlib.blake2b(b"%d" % i, digest_size=16).digest() for i in range(start, start + count))
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 16)


@pytest.mark.parametrize(
    ("sizes", "cap", "level"),
    [([], 10, 0), ([5], 10, 5), ([5], 3, 3), ([10, 10], 10, 5), ([1, 100, 100], 21, 10), ([3, 3, 3], 100, 3)],
)
def test_water_level(sizes: list[int], cap: int, level: int) -> None:
    assert water_level(sizes, cap) == level


def test_order_depends_on_content_and_seed_alone() -> None:
    keys = keys_of(200)
    shuffled = np.random.default_rng(1).permutation(200)
    assert np.array_equal(keys[in_order(keys, 0)], keys[shuffled][in_order(keys[shuffled], 0)])
    assert not np.array_equal(in_order(keys, 0), in_order(keys, 1))


def naive_under_cap(order: list[int], sizes: list[int], sources: list[int], cap: int) -> list[int]:
    offered: dict[int, int] = {}
    for row in order:
        offered[sources[row]] = offered.get(sources[row], 0) + sizes[row]
    level = water_level(list(offered.values()), cap)
    total = dict.fromkeys(offered, 0)
    kept, crossing, over = set(), [], set()
    for row in order:
        total[sources[row]] += sizes[row]
        if total[sources[row]] <= level:
            kept.add(row)
        elif sources[row] not in over:
            over.add(sources[row])
            crossing.append(row)
    room = cap - sum(sizes[row] for row in kept)
    for row in crossing:
        if sizes[row] <= room:
            kept.add(row)
            room -= sizes[row]
    return [row for row in order if row in kept]


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 4)), max_size=60), st.integers(1, 1500), st.data())
def test_cap_is_a_fair_share_of_every_source(rows: list[tuple[int, int]], cap: int, data: st.DataObject) -> None:
    sizes, sources = [size for size, _ in rows], [source for _, source in rows]
    order = data.draw(st.permutations(range(len(rows))))
    order = order[: data.draw(st.integers(0, len(rows)))]
    columns = np.array(sizes, dtype=np.int64), np.array(sources, dtype=np.int64)
    chosen = under_cap(np.array(order, dtype=np.int64), *columns, cap).tolist()
    assert chosen == naive_under_cap(order, sizes, sources, cap)
    assert sum(sizes[row] for row in chosen) <= cap


def test_many_sources_of_large_documents_fill_the_cap() -> None:
    """A hundred sources whose every document is above the fair share still give what fits."""
    sources = np.arange(300, dtype=np.int64) % 100
    chosen = under_cap(np.arange(300, dtype=np.int64), np.full(300, 1000, dtype=np.int64), sources, 10_500)
    assert len(chosen) == 10 and len(set(sources[chosen].tolist())) == 10


@pytest.mark.parametrize("fraction", [1e-9, 0.02, 0.5, 1 - 1e-9])
def test_split_is_disjoint_complete_and_never_empty(fraction: float) -> None:
    keys = keys_of(50)
    train, heldout = split_heldout(in_order(keys, 0), keys, fraction, 0)
    assert len(train) and len(heldout)
    assert sorted([*train.tolist(), *heldout.tolist()]) == list(range(50))


def test_side_depends_on_the_document_alone() -> None:
    keys = keys_of(900)
    small = split_heldout(np.arange(300, dtype=np.int64), keys, 0.2, 0)[1]
    large = split_heldout(np.arange(900, dtype=np.int64), keys, 0.2, 0)[1]
    assert set(small.tolist()) == set(large[large < 300].tolist())
    assert abs(len(large) - 180) < 60
