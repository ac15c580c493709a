"""Which chunk asks with what, and that the answer depends on nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_pipeline.build import BuiltData
from data_pipeline.provenance import FOREVER
from data_pipeline.retrieval.build import build_index
from data_pipeline.retrieval.guard import Guard
from data_pipeline.retrieval.neighbours import Neighbours
from data_pipeline.stream import SampleStream
from tests.unit.data_pipeline.retrieval.indexes import encoded_index

SEQ, CHUNK, FAN_IN = 32, 8, 3
GUARD = Guard(0.2, FOREVER, 0.0)


def sample(tokens: list[int], documents: list[int]) -> Any:
    return SimpleNamespace(tokens=np.array([*tokens, 0]), documents=np.array([*documents, documents[-1]]))


def topic(number: int) -> list[int]:
    return [number * 10 + i for i in range(4)]


@pytest.fixture
def by_topic() -> Neighbours:
    """Record i is about topic i and belongs to document i."""
    return Neighbours(encoded_index([topic(i) for i in range(6)], 1024), GUARD, 2)


def test_a_chunk_asks_with_its_own_tokens(by_topic: Neighbours) -> None:
    tokens = [*topic(3), *topic(1), *topic(5)]
    ids = by_topic.of([sample(tokens, [9] * 12)])
    assert ids.shape == (1, 2, 2) and ids[0, :, 0].tolist() == [3, 1]  # the last chunk is for no one


def test_last_document_asks_alone(by_topic: Neighbours) -> None:
    tokens = [10, 11, 20, 21, *topic(0)]
    whole = by_topic.of([sample(tokens, [9] * 8)])
    last = by_topic.of([sample(tokens, [8, 8, 9, 9, 9, 9, 9, 9])])
    assert sorted(whole[0, 0].tolist()) == [1, 2] and last[0, 0].tolist() == [2, -1]


def test_own_document_is_never_found(by_topic: Neighbours) -> None:
    assert by_topic.of([sample([*topic(3), *topic(3)], [3] * 8)]).tolist() == [[[-1, -1]]]
    assert by_topic.take_counts().rejected["own_document"] == 1
    assert by_topic.of([sample([*topic(3), *topic(3)], [2] * 8)]).tolist() == [[[3, -1]]]


def test_one_chunk_asks_nothing(by_topic: Neighbours) -> None:
    assert by_topic.of([sample([1, 2, 3], [0] * 3)]).shape == (1, 0, 2)
    assert by_topic.take_counts().queries == 0


def test_a_last_piece_of_a_chunk_reads_but_does_not_ask(by_topic: Neighbours) -> None:
    ids = by_topic.of([sample([*topic(3), *topic(1), 50], [9] * 9)])
    assert ids[0, :, 0].tolist() == [3, 1]


@pytest.fixture(scope="module")
def built(mixed: BuiltData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Neighbours]:
    folder = Path(shutil.copytree(mixed.folder, tmp_path_factory.mktemp("neighbours") / "data"))
    _, index = build_index(folder, CHUNK, 64, log=lambda line: None)
    return folder, Neighbours(index, GUARD, FAN_IN)


def test_ids_depend_on_the_sample_alone(built: tuple[Path, Neighbours]) -> None:
    """However many are asked at once, in whatever order, before or after others: what resuming and resharding need."""
    folder, neighbours = built
    stream = SampleStream(folder, SEQ, seed=1)
    samples = [stream.sample(i) for i in range(40)]
    at_once = neighbours.of(samples)
    assert at_once.shape == (40, SEQ // CHUNK - 1, FAN_IN) and (at_once[..., 0] >= 0).mean() > 0.5
    one_by_one = np.concatenate([neighbours.of([one]) for one in reversed(samples)])[::-1]
    assert np.array_equal(at_once, one_by_one)
    again = Neighbours(build_index(folder, CHUNK, 64)[1], GUARD, FAN_IN)
    assert np.array_equal(again.of(samples[20:]), at_once[20:])


def test_training_text_never_finds_its_document_and_heldout_is_not_in_the_index(
    built: tuple[Path, Neighbours],
) -> None:
    folder, neighbours = built
    train, heldout = SampleStream(folder, SEQ, 1), SampleStream(folder, SEQ, 1, "heldout")
    own = neighbours.index.documents
    for one in train.in_order():
        asking = one.documents[:-1].reshape(-1, CHUNK)[:-1, -1]
        found = neighbours.of([one])[0]
        assert not ((own[found] == asking[:, None]) & (found >= 0)).any()
    assert neighbours.take_counts().rejected["own_document"] > 0
    for one in heldout.in_order():
        assert one.documents.min() > own.max()
        neighbours.of([one])
    assert neighbours.take_counts().rejected["own_document"] == 0


def test_valid_ids_come_first_and_counts_agree(built: tuple[Path, Neighbours]) -> None:
    folder, neighbours = built
    neighbours.take_counts()
    stream = SampleStream(folder, SEQ, seed=1)
    ids = neighbours.of([stream.sample(i) for i in range(30)])
    assert (np.diff((ids >= 0).astype(int), axis=2) <= 0).all() and ids.max() < len(neighbours.index.records)
    counts = neighbours.take_counts()
    assert counts.kept == (ids >= 0).sum() and counts.queries == ids.shape[0] * ids.shape[1]
    assert sum(counts.histogram) == counts.queries * 4 * FAN_IN
