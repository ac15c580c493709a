"""Retrieval tasks: whose text the records are, which is the answer, how hard the others are."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.retrieval.encoder import PAD
from data_pipeline.tasks.compose import Kind
from data_pipeline.tasks.keyed import hashes, key_of
from data_pipeline.tasks.library import DIM, Library, build_library, chunk_of
from data_pipeline.tasks.retrieval import CEILING, FEWEST, MARGIN, MOST, RetrievalTasks
from data_pipeline.tasks.text import Vocabulary, read_text
from refractor_megatron.tokenizer import Tokenizer
from tests.unit.data_pipeline.tasks.conftest import LENGTHS, MadeTasks, Task
from tests.unit.data_pipeline.tasks.drafts import TRAIN

BOTH = (("tasks", "train"), ("tasks-heldout", "heldout"))
SEED = 7  # of the fixture


def _of_kind(made: MadeTasks, name: str, *kinds: Kind) -> list[Task]:
    tasks = [task for task in made.tasks(name) if task.row["kind"] in kinds]
    assert len(tasks) >= 10
    return tasks


def _library(made: MadeTasks, split: str, chunk: int, limit: int = 1 << 16) -> Library:
    return _built(made.folder, split, chunk, limit)


@lru_cache(maxsize=8)
def _built(folder: Path, split: str, chunk: int, limit: int) -> Library:
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return build_library(read_text(folder, split, Vocabulary(tokenizer)), chunk, tokenizer.vocab_size, SEED, limit)


def _vectors(library: Library, chunks: list[Any]) -> Any:
    padded = np.full((len(chunks), max(map(len, chunks))), PAD, dtype=np.int32)
    for row, chunk in zip(padded, chunks, strict=True):
        row[: len(chunk)] = chunk
    return library.index.encoder.encode(padded)


def _copied(task: Task) -> list[Any]:
    return [task.tokens[one["at"] :][: one["length"]] for one in task.origins]


@pytest.mark.parametrize(("name", "split"), BOTH)
def test_no_record_is_of_the_document_that_is_asked_about(made: MadeTasks, name: str, split: str) -> None:
    for task in _of_kind(made, name, Kind.CONTINUATION):
        records, (question, answer) = task.origins[: task.row["records"]], task.origins[task.row["records"] :]
        assert question["document"] == answer["document"] not in records["document"]
        assert question["start"] + question["length"] == answer["start"]
        assert (answer["at"], answer["length"]) == (task.row["answer_start"], task.row["answer_length"])
    for task in _of_kind(made, name, Kind.CONTINUATION, Kind.LOOKUP):
        records = task.origins[: task.row["records"]]
        assert FEWEST <= len(records) <= MOST
        assert len(set(records["document"].tolist())) == len(records)


@pytest.mark.parametrize(("name", "split"), BOTH)
def test_the_answer_of_a_lookup_stands_in_one_record_alone(made: MadeTasks, name: str, split: str) -> None:
    for task in _of_kind(made, name, Kind.LOOKUP):
        text = made.text(task.tokens)
        records = re.findall(rb"<\|data\|>Record (\d+):\n(.*?)<\|end\|>", text, re.DOTALL)
        found = re.search(rb'<\|user\|>Which record contains "(.*?)"\? Give', text, re.DOTALL)
        given = re.search(rb"<\|assistant\|>Record (\d+):(.*?)<\|end\|>", text, re.DOTALL)
        assert found and given
        holding = [(number, body) for number, body in records if found[1] in body]
        assert [number for number, _ in holding] == [given[1]] == [b"%d" % (task.row["label"] + 1)]
        assert holding[0][1].split(found[1])[1].startswith(given[2]) and given[2].strip()
        first, behind = task.row["evidence"][0]
        evidence = made.tokenizer.decode(task.tokens[first:behind].tolist())
        assert evidence == found[1] + given[2]


def _similarities(made: MadeTasks, split: str, task: Task) -> Any:
    """Of the records with what they were looked up by: the continuation, or the record that is the answer."""
    library = _library(made, split, chunk_of(int(task.row["stage"])))
    copied = _copied(task)
    asked = copied[-1] if task.row["kind"] == Kind.CONTINUATION else copied[task.row["label"]]
    vectors = _vectors(library, [*copied[: task.row["records"]], asked])
    return vectors[:-1] @ vectors[-1]


@pytest.mark.parametrize(("name", "split"), BOTH)
def test_the_label_is_the_nearest_record_by_a_margin_and_no_copy(made: MadeTasks, name: str, split: str) -> None:
    for task in _of_kind(made, name, Kind.CONTINUATION):
        similarity, label = _similarities(made, split, task), int(task.row["label"])
        assert similarity.argmax() == label and similarity[label] <= CEILING
        assert (np.delete(similarity, label) <= similarity[label] - np.float32(MARGIN)).all()
    for task in _of_kind(made, name, Kind.LOOKUP):
        similarity = _similarities(made, split, task)
        assert (np.delete(similarity, int(task.row["label"])) <= CEILING).all()


def test_a_near_identical_twin_is_never_the_neighbour(made: MadeTasks) -> None:
    """Of every chunk of the two documents that are the same but for a line."""
    library = _library(made, "train", 32)
    tasks = RetrievalTasks(library, Vocabulary(made.tokenizer), SEED)
    twins, seen = [10, TRAIN], 0
    for row in np.flatnonzero(np.isin(library.index.documents, twins)):
        found = library.search(np.array([row]), 4)
        query = tasks._query(int(row), found.similarity[0], found.ids[0])
        assert (query.similarity <= CEILING).all() and len(query.rows)
        seen += found.similarity[0, 0] > CEILING
    assert seen >= 8


def test_a_phrase_that_another_record_holds_is_passed_over(made: MadeTasks) -> None:
    library, vocabulary = _library(made, "train", 128), Vocabulary(made.tokenizer)
    tasks = RetrievalTasks(library, vocabulary, SEED)
    compared = 0
    for row in range(20):
        tokens = tasks._chunk(row)
        found = tasks._rare_phrase(tokens, b"")
        if found:
            phrase = vocabulary.decode(tokens[found[0] : found[1]])
            other = tasks._rare_phrase(tokens, b"some text" + phrase + b" and more")
            assert other is None or phrase not in vocabulary.decode(tokens[other[0] : other[1]])
            assert tasks._rare_phrase(tokens, vocabulary.decode(tokens)) is None
            twice = np.concatenate([tokens, tokens])
            other = tasks._rare_phrase(twice, b"")  # across the seam, if at all
            assert other is None or other[0] < len(tokens) < other[1]
            compared += 1
    assert compared >= 10


@pytest.mark.parametrize("kind", [Kind.CONTINUATION, Kind.LOOKUP])
def test_negatives_are_nearer_than_chunks_drawn_at_random(made: MadeTasks, kind: Kind) -> None:
    library = _library(made, "train", chunk_of(LENGTHS[-1]))
    hard, chance = [], []
    for task in _of_kind(made, "tasks", kind):
        if task.row["stage"] != LENGTHS[-1]:
            continue
        similarity = _similarities(made, "train", task)
        hard += np.delete(similarity, int(task.row["label"])).tolist()
        asked = _copied(task)[-1 if kind == Kind.CONTINUATION else int(task.row["label"])]
        rows = hashes(key_of("random chunks"), np.arange(40) + len(hard)) % np.uint64(len(library))
        chance += (library.index.vectors[rows.astype(np.int64)] @ _vectors(library, [asked])[0]).tolist()
    assert np.mean(hard) > np.mean(chance) + 0.1, (np.mean(hard), np.mean(chance))


def test_the_answer_stands_anywhere_among_the_records(made: MadeTasks) -> None:
    tasks = _of_kind(made, "tasks", Kind.CONTINUATION, Kind.LOOKUP)
    place = np.array([task.row["label"] / (task.row["records"] - 1) for task in tasks])
    assert 0.35 < place.mean() < 0.65 and {0.0, 1.0} <= set(place.tolist())


def test_the_index_excludes_by_text_and_is_the_same_where_documents_are_texts(made: MadeTasks) -> None:
    vocabulary = Vocabulary(made.tokenizer)
    count = len(read_text(made.folder, "train", vocabulary).whole)
    draw = np.random.default_rng(3).integers(0, 20, count)
    text = read_text(made.folder, "train", vocabulary, draw)
    library = build_library(text, 32, made.tokenizer.vocab_size, SEED)
    plain = _library(made, "train", 32)
    records = library.index.records
    assert sorted(records["start"].tolist()) == plain.index.records["start"].tolist()
    document = np.searchsorted(text.data.starts, records["start"], side="right") - 1
    assert np.array_equal(records["document"], draw[document])
    assert (np.lexsort((records["start"], records["document"])) == np.arange(len(records))).all()
    assert ((records["start"] - library.run_start) % 32 == 0).all() and (library.run_start <= records["start"]).all()
    same = np.searchsorted(plain.index.records["start"], records["start"])
    assert np.array_equal(library.index.vectors, plain.index.vectors[same])
    found = library.search(np.arange(0, len(library), 7), 8)
    assert (records["document"][found.ids] != records["document"][::7][:, None])[found.ids >= 0].all()


def test_the_index_is_bounded_and_its_sample_a_function_of_the_seed(made: MadeTasks) -> None:
    whole, part, again = (_library(made, "train", 32, limit) for limit in (1 << 16, 50, 50))
    assert len(whole) == whole.chunks == part.chunks > 50 and len(part) == 50
    assert part.index.vectors.shape == (50, DIM)
    assert np.array_equal(part.index.records, again.index.records)
    assert (np.diff(part.index.records["start"]) > 0).all() and (np.diff(part.index.documents) >= 0).all()
    assert np.isin(part.index.records["start"], whole.index.records["start"]).all()
    for library in (whole, part):
        starts = library.index.records["start"]
        assert (library.run_start <= starts).all() and not ((starts - library.run_start) % 32).any()


def test_sequences_too_short_for_a_choice_have_no_records() -> None:
    assert chunk_of(128) == 0 and chunk_of(2048) == chunk_of(131072) == 128 and 0 < chunk_of(512) < 128
