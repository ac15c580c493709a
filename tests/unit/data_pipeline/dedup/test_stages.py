"""Stages of near-duplicate removal: what is kept, what is run again, what goes into the audit log."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.dedup import lsh
from data_pipeline.dedup.minhash import Signer
from data_pipeline.dedup.removals import Removals, deduplicate, largest_clusters
from data_pipeline.dedup.stages import near_survivors
from data_pipeline.engine.arrays import save_arrays
from data_pipeline.engine.tasks import task_folder
from data_pipeline.options import Dedup
from data_pipeline.shards import Shard
from refractor_megatron.errors import DataError
from tests.unit.data_pipeline.dedup.naive import Serial, flatten, ids_of, naive_jaccard, write_corpus

OPTIONS = Dedup(enabled=True)


def prose(topic: str, count: int = 80, changed: tuple[int, ...] = ()) -> bytes:
    return " ".join("changed" if i in changed else f"{topic}{i}" for i in range(count)).encode()


TEXTS = [
    prose("a"),
    prose("a", changed=(40,)),
    prose("b"),
    prose("a"),  # equal to the first
    prose("c"),
    prose("a", count=90),  # the longest of its kind
    prose("a", changed=(10, 20, 30, 40, 50, 60)),  # too far from the others
]


def remove(
    shards: list[Path], work: Path, options: Dedup = OPTIONS, executor: Serial | None = None,
    quality: list[float] | None = None, keep: list[bool] | None = None,
) -> Removals:  # fmt: skip
    sizes = [len(Shard(path)) for path in shards]
    bounds = np.cumsum(sizes)[:-1]
    scores = np.array(quality or [0.0] * sum(sizes), dtype=np.float32)
    kept = np.array(keep or [True] * sum(sizes))
    return deduplicate(
        shards, np.split(kept, bounds), np.split(scores, bounds), ["s"], options, executor or Serial(), work,
        lambda line: None,
    )  # fmt: skip


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_corpus(tmp_path / "shards", TEXTS, 3)


def test_the_longest_stays_and_only_what_resembles_it_goes(tmp_path: Path, shards: list[Path]) -> None:
    found = remove(shards, tmp_path / "work")
    assert np.concatenate(found.removed).tolist() == [True, True, False, True, False, False, False]
    assert [len(mask) for mask in found.removed] == [3, 3, 1]
    assert found.counts == {"exact": 1, "near": 2} and found.by_source == {"s": {"exact": 1, "near": 2}}


def test_quality_goes_before_length(tmp_path: Path, shards: list[Path]) -> None:
    found = remove(shards, tmp_path / "work", quality=[0, 1, 0, 0, 0, 0.5, 0])
    assert np.concatenate(found.removed).tolist() == [True, False, False, True, False, True, False]


def test_what_was_dropped_before_takes_no_part(tmp_path: Path, shards: list[Path]) -> None:
    found = remove(shards, tmp_path / "work", keep=[True, True, True, True, True, False, True])
    removed = np.concatenate(found.removed).tolist()
    assert removed[:3].count(True) + removed[3] == 2 and not removed[5]
    assert removed[0] or removed[3]


def test_without_near_duplicates_only_equal_ones_go(tmp_path: Path, shards: list[Path]) -> None:
    executor = Serial()
    found = remove(shards, tmp_path / "work", Dedup(), executor)
    assert found.counts == {"exact": 1, "near": 0} and executor.ran == []


def test_a_chain_of_neighbours_removes_only_neighbours(tmp_path: Path) -> None:
    """a-b and b-c are near, a-c are not: with a first, b goes and c stays."""
    texts = [prose("x", 100), prose("x", 100, (5, 95)), prose("x", 100, (5, 30, 65, 95))]
    assert naive_jaccard(texts[0], texts[2], 5) < 0.7 < naive_jaccard(texts[1], texts[2], 5)
    shards = write_corpus(tmp_path / "shards", texts, 9)
    options = replace(OPTIONS, bands=64, rows=2)
    found = remove(shards, tmp_path / "work", options, quality=[1, 0.5, 0])
    assert found.removed[0].tolist() == [False, True, False]


def test_audit_rows(tmp_path: Path, shards: list[Path]) -> None:
    ids = ids_of(shards)
    found = remove(shards, tmp_path / "work")
    rows = list(found.audit())
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    by_id = {row["id"]: row for row in rows}
    kept_twin = 0 if ids[0] <= ids[3] else 3  # equal content in one source has one id
    near = by_id[ids[1]]
    assert near == {
        "id": ids[1], "source": 0, "action": "drop", "filter": "near-duplicate",
        "score": naive_jaccard(TEXTS[1], TEXTS[5], 5), "threshold": 0.7, "rule": "minhash-direct/1",
        "detail": f"survivor={ids[5]}",
    }  # fmt: skip
    exact = [row for row in rows if row["filter"] == "exact-duplicate"]
    assert len(exact) == 1 and exact[0]["score"] == exact[0]["threshold"] == 1.0
    assert exact[0]["detail"] == f"survivor={ids[5]} same-content-as={ids[kept_twin]}"
    # what is equal stays known though both went for a near one
    assert [rows.tolist() for rows in found.equal] == [[3 - kept_twin], [kept_twin]]


def test_clusters_are_largest_first_with_places(tmp_path: Path, shards: list[Path]) -> None:
    extra = write_corpus(tmp_path / "more", [prose("b", changed=(3,))], 1)
    found = remove([*shards, *extra], tmp_path / "work")
    first, second = largest_clusters(found.clusters, 5)
    assert (len(first.members), len(second.members)) == (3, 1)
    assert first.place == (1, 2) and Shard(shards[1]).ids[2].tobytes() == first.survivor
    for member in first.members:
        shard, row = member["place"]
        assert Shard(shards[shard]).ids[row].tobytes() == member["id"]
        assert member["jaccard"] == naive_jaccard(Shard(shards[shard]).text_of(row), TEXTS[5], 5)
    assert {member["kind"] for member in first.members} == {"exact", "near"}
    assert largest_clusters(found.clusters, 1) == [first]
    (cut,) = largest_clusters(found.clusters, 1, examples=2)
    assert cut.size == first.size == 3 and cut.members == first.members[:2]


def test_a_new_threshold_signs_nothing_again(tmp_path: Path, shards: list[Path]) -> None:
    remove(shards, tmp_path / "work")
    executor = Serial()
    remove(shards, tmp_path / "work", replace(OPTIONS, threshold=0.9), executor)
    did = dict(executor.ran)
    assert did["dedup-sign"] == did["dedup-bands"] == did["dedup-pairs"] == did["dedup-sets"] == 0
    assert did["dedup-verify"] == len(shards)


def test_another_mask_signs_nothing_again_but_compares_anew(tmp_path: Path, shards: list[Path]) -> None:
    remove(shards, tmp_path / "work")
    executor = Serial()
    remove(shards, tmp_path / "work", executor=executor, keep=[True] * 5 + [False, True])
    did = dict(executor.ran)
    assert did["dedup-sign"] == 0 and did["dedup-bands"] == len(shards)


def test_signatures_of_another_seed_are_refused(tmp_path: Path, shards: list[Path]) -> None:
    remove(shards, tmp_path / "work")
    (folder,) = (tmp_path / "work").glob("dedup-sign-*")
    header = task_folder(folder, 1) / "signatures.json"
    header.write_text(header.read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(DataError, match="seed = 2 where 1"):
        remove(shards, tmp_path / "work", keep=[True] * 6 + [False])


def test_copies_of_a_template_cost_little(tmp_path: Path) -> None:
    """2000 near-equal documents: not their two million pairs, and still all but one go."""
    texts = [prose("t", 60) + f" number{i}".encode() for i in range(2000)]
    shards = write_corpus(tmp_path / "shards", texts, 700)
    work = tmp_path / "work"
    work.mkdir()
    near = near_survivors(shards, np.arange(2000)[::-1].copy(), OPTIONS, Serial(), work, lambda line: None)
    assert (near.survivor >= 0).sum() == 1999 and set(near.survivor[:1999].tolist()) == {1999}
    assert near.compared < 40_000


def test_a_large_group_whose_first_is_unlike_the_rest(tmp_path: Path) -> None:
    """All share a band; the first of them resembles none, so the rest are compared in further rounds."""
    boiler = " ".join(f"boiler{i}" for i in range(60))
    texts = [f"{boiler} {prose(topic, 40, changed).decode()}".encode() for topic in "abcd" for changed in ((), (39,))]
    shards = write_corpus(tmp_path / "shards", texts, 3)
    work = tmp_path / "work"
    work.mkdir()
    one_group = (s for s in range(99) if len(lsh.candidate_pairs(Signer(1, s).sign(*flatten(texts)), 1, 1)) == 28)
    options = replace(OPTIONS, bands=1, rows=1, seed=next(one_group))
    near = near_survivors(shards, np.arange(8), options, Serial(), work, lambda line: None, whole=2, most=8)
    assert near.survivor.tolist() == [-1, 0, -1, 2, -1, 4, -1, 6] and near.rounds > 2


def test_no_documents_and_lonely_documents(tmp_path: Path) -> None:
    none = deduplicate([], [], [], [], OPTIONS, Serial(), tmp_path, lambda line: None)
    assert none.removed == [] and none.counts == {"exact": 0, "near": 0}
    shards = write_corpus(tmp_path / "shards", [b"one", b"two", b"", b"!"], 2)
    found = remove(shards, tmp_path / "work")
    assert not np.concatenate(found.removed).any() and list(found.audit()) == []
    assert largest_clusters(found.clusters, 3) == []
    assert not np.concatenate(remove(shards, tmp_path / "off", keep=[False] * 4).removed).any()


@pytest.mark.parametrize(("rows", "partitions"), [(0, 1), (1 << 19, 1), ((1 << 19) + 1, 2), (5 << 19, 8)])
def test_partitions_are_a_power_of_two_of_bounded_size(rows: int, partitions: int) -> None:
    assert lsh.partitions_for(rows) == partitions


@pytest.mark.parametrize("partitions", [1, 2, 8])
def test_partitions_cover_every_key_once(partitions: int) -> None:
    keys = np.sort(np.random.default_rng(0).integers(0, 1 << 64, 1000, dtype=np.uint64))
    keys[0], keys[-1] = 0, (1 << 64) - 1
    keys[500] = np.uint64(1 << 63)
    keys.sort()
    slices = [lsh.partition_slice(keys, i, partitions) for i in range(partitions)]
    assert slices[0].start == 0 and slices[-1].stop == 1000
    assert all(one.stop == other.start for one, other in zip(slices, slices[1:], strict=False))
    for i, one in enumerate(slices):
        assert all(int(key) * partitions >> 64 == i for key in keys[one])


def test_arrays_are_named_by_content(tmp_path: Path) -> None:
    one = save_arrays(tmp_path, "x", a=np.arange(3), b=np.zeros(2))
    assert save_arrays(tmp_path, "x", b=np.zeros(2), a=np.arange(3)) == one
    assert save_arrays(tmp_path, "x", a=np.arange(3).astype(np.int32), b=np.zeros(2)) != one
    assert np.load(one.folder / "a.npy").tolist() == [0, 1, 2]
