"""Deduplication equals comparing everything with everything, whatever the order, the groups and the shards."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dedup import lsh
from data_pipeline.dedup.cluster import rank_documents, survivors
from data_pipeline.dedup.exact import exact_survivors
from data_pipeline.dedup.minhash import Signer
from data_pipeline.dedup.removals import Removals, deduplicate
from data_pipeline.dedup.stages import near_survivors
from data_pipeline.dedup.verify import jaccard
from data_pipeline.options import Dedup
from data_pipeline.shards import Shard
from tests.unit.data_pipeline.dedup.naive import (
    Serial,
    all_edges,
    flatten,
    ids_of,
    naive_greedy,
    naive_jaccard,
    write_corpus,
)

#: One place in a band: two documents meet as soon as they agree anywhere, so hardly a pair is missed.
EAGER = Dedup(enabled=True, threshold=0.6, ngram=1, bands=32, rows=1, seed=4)
WORDS = [f"w{i}" for i in range(12)]


@st.composite
def corpora(draw: st.DrawFn, least: int = 1, most: int = 14) -> list[bytes]:
    """Short documents over few words: many are near, some equal."""
    return draw(
        st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join).map(str.encode),
                 min_size=least, max_size=most)
    )  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 25), st.data())
def test_survivors_equal_slow_greedy(count: int, data: st.DataObject) -> None:
    """In any order of edges; documents of rank -1 take no part."""
    ranks = np.array(data.draw(st.permutations(range(count))), dtype=np.int64)
    absent = data.draw(st.integers(0, count - 1))
    ranks[ranks < absent] = -1
    present = np.flatnonzero(ranks >= 0).tolist()
    node = st.sampled_from(present)
    edges = data.draw(st.lists(st.tuples(node, node).filter(lambda pair: pair[0] != pair[1]), max_size=60))
    survivor, edge = survivors(np.array(edges, dtype=np.int64).reshape(-1, 2), ranks)
    expected = naive_greedy(sorted(present, key=lambda one: ranks[one]), set(edges))
    assert {one: int(survivor[one]) for one in np.flatnonzero(survivor >= 0).tolist()} == expected
    for one, other in expected.items():
        assert set(edges[edge[one]]) == {one, other}
    assert np.array_equal(edge >= 0, survivor >= 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 3), st.binary(min_size=16, max_size=16)),
                min_size=1, max_size=20, unique_by=lambda row: row[2]))  # fmt: skip
def test_rank_is_quality_then_length_then_id(rows: list[tuple[float, int, bytes]]) -> None:
    quality, sizes, ids = zip(*rows, strict=True)
    flat = np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(-1, 16)
    ranks = rank_documents(np.array(quality, dtype=np.float32), np.array(sizes), flat)
    expected = sorted(range(len(rows)), key=lambda i: (-quality[i], -sizes[i], ids[i]))
    assert np.argsort(ranks).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=20), st.data())
def test_exact_survivors_equal_slow_ones(rows: list[tuple[int, bool]], data: st.DataObject) -> None:
    ranks = np.array(data.draw(st.permutations(range(len(rows)))), dtype=np.int64)
    keys = np.array([[key] * 16 for key, _ in rows], dtype=np.uint8).reshape(-1, 16)
    found = exact_survivors(keys, ranks, np.array([keep for _, keep in rows], dtype=np.bool_))
    for i, (key, keep) in enumerate(rows):
        equal = [k for k in range(len(rows)) if rows[k] == (key, True)]
        best = min(equal, key=lambda k: ranks[k]) if keep else i
        assert found[i] == (-1 if best == i else best)


@settings(max_examples=40, deadline=None)
@given(corpora(), st.integers(1, 3))
def test_jaccard_equals_slow_jaccard(texts: list[bytes], ngram: int) -> None:
    pairs = np.array([(a, b) for a in range(len(texts)) for b in range(a, len(texts))], dtype=np.int64)
    expected = [naive_jaccard(texts[a], texts[b], ngram) for a, b in pairs.tolist()]
    assert jaccard(*flatten(texts), pairs, ngram).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(corpora(), st.integers(1, 4), st.integers(1, 3))
def test_candidates_are_the_pairs_that_share_a_band(texts: list[bytes], bands: int, rows: int) -> None:
    signatures = Signer(bands * rows, 5, ngram=1).sign(*flatten(texts))
    cut = signatures.reshape(len(texts), bands, rows)
    expected = [
        [a, b] for a in range(len(texts)) for b in range(a + 1, len(texts)) if (cut[a] == cut[b]).all(axis=1).any()
    ]
    assert lsh.candidate_pairs(signatures, bands, rows).tolist() == expected


@settings(max_examples=20, deadline=None)
@given(
    corpora(2, 24),
    st.integers(5, 12),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from([100, 1 << 19]),
    st.data(),
)
def test_rounds_equal_comparing_all_candidates(
    texts: list[bytes], bands: int, whole: int, most: int, partition_rows: int, data: st.DataObject
) -> None:
    """Large groups, compared in rounds of any size, end as if all their pairs had been."""
    ranks = np.array(data.draw(st.permutations(range(len(texts)))), dtype=np.int64)
    candidates = lsh.candidate_pairs(Signer(bands, EAGER.seed, 1).sign(*flatten(texts)), bands, 1)
    met = {(a, b) for a, b in candidates.tolist()}
    expected = naive_greedy(np.argsort(ranks).tolist(), met & all_edges(texts, 1, EAGER.threshold))
    with tempfile.TemporaryDirectory() as folder, patch.object(lsh, "PARTITION_ROWS", partition_rows):
        shards = write_corpus(Path(folder, "shards"), texts, 9)
        options = replace(EAGER, bands=bands)
        near = near_survivors(shards, ranks, options, Serial(), Path(folder), lambda line: None, whole, most)
    gone = np.flatnonzero(near.survivor >= 0).tolist()
    assert {one: int(near.survivor[one]) for one in gone} == expected
    assert {one: near.jaccard[one] for one in gone} == {
        one: naive_jaccard(texts[one], texts[other], 1) for one, other in expected.items()
    }


def run(folder: Path, shards: Sequence[Path], quality: dict[str, float], kept: set[str]) -> Removals:
    ids = [[one.tobytes().hex() for one in Shard(path).ids] for path in shards]
    keep: list[npt.NDArray[np.bool_]] = [np.array([one in kept for one in row]) for row in ids]
    scores = [np.array([quality[one] for one in row], dtype=np.float32) for row in ids]
    return deduplicate(shards, keep, scores, ["s"], EAGER, Serial(), folder, lambda line: None)


@settings(max_examples=15, deadline=None)
@given(corpora(1, 20), st.integers(4, 9), st.integers(4, 9), st.data())
def test_outcome_depends_on_documents_alone(texts: list[bytes], one: int, other: int, data: st.DataObject) -> None:
    """Other shards and another order: the same ids go, for the same survivors, which all stay."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        first = write_corpus(root / "a", texts, one)
        ids = sorted(set(ids_of(first)))
        quality = {name: data.draw(st.sampled_from([0.0, 1.0])) for name in ids}
        kept = {name for name in ids if data.draw(st.integers(0, 4))}
        shuffled = data.draw(st.permutations(texts))
        second = write_corpus(root / "b", shuffled, other)
        (root / "x").mkdir(), (root / "y").mkdir()
        results = [run(root / "x", first, quality, kept), run(root / "y", list(reversed(second)), quality, kept)]
        rows = [list(result.audit()) for result in results]
        stay = [
            {one for one, gone in zip(ids_of(paths), np.concatenate(result.removed), strict=True) if not gone} & kept
            for paths, result in zip((first, list(reversed(second))), results, strict=True)
        ]
    assert rows[0] == rows[1] and stay[0] == stay[1]
    assert results[0].counts == results[1].counts
    assert len(rows[0]) == sum(results[0].counts.values()) == int(np.concatenate(results[0].removed).sum())
    for row in rows[0]:
        assert row["id"] in kept and row["detail"][9:41] in stay[0]  # "survivor=" and its id


def test_recall_of_planted_duplicates_follows_the_curve() -> None:
    """16 bands of 8: of 300 pairs with a Jaccard index of .8 and more, over several seeds, 99 in 100 are candidates."""
    draw = random.Random(3)
    texts: list[bytes] = []
    for i in range(300):
        words = [f"d{i}x{k}" for k in range(120)]
        texts.append(" ".join(words).encode())
        for place in draw.sample(range(120), draw.randrange(3)):
            words[place] = "other"
        texts.append(" ".join(words).encode())
    flat, offsets = flatten(texts)
    planted = np.arange(600, dtype=np.int64).reshape(-1, 2)
    near = planted[jaccard(flat, offsets, planted) >= 0.8]
    assert len(near) > 200
    found = total = 0
    for seed in range(6):
        pairs = {tuple(pair) for pair in lsh.candidate_pairs(Signer(128, seed).sign(flat, offsets), 16, 8).tolist()}
        found += sum(tuple(pair) in pairs for pair in near.tolist())
        total += len(near)
        assert pairs <= {tuple(pair) for pair in planted.tolist()}  # unrelated documents never meet
    assert found >= 0.99 * total
