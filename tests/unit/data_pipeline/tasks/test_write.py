"""The files of tasks: formats, budgets, whose text they are made of."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.documents import Document, Part
from data_pipeline.options import Tasks
from data_pipeline.pack.indexed import read_indexed
from data_pipeline.tasks.compose import Conversation, Kind
from data_pipeline.tasks.write import EVALUATION, generate
from data_pipeline.tokenise.encode import encode_document
from refractor_megatron.distinction.roles import ROLE_ID, MaskBit
from refractor_megatron.errors import DataError
from refractor_megatron.tokenizer import Tokenizer
from tests.unit.data_pipeline.tasks.conftest import BUDGET, LENGTHS, OPTIONS, MadeTasks
from tests.unit.data_pipeline.tasks.drafts import forbidden_words

FILES = ("tasks.bin", "tasks.idx", "tasks.rec", "tasks.npy", "tasks-origins.npy")
BOTH = (("tasks", "train"), ("tasks-heldout", "heldout"))


@pytest.mark.parametrize(("name", "split"), BOTH)
def test_every_kind_is_made_and_none_is_longer_than_its_stage(made: MadeTasks, name: str, split: str) -> None:
    tasks = made.tasks(name)
    assert {Kind(task.row["kind"]) for task in tasks} == set(Kind)
    for task in tasks:
        size, stage = len(task.tokens), int(task.row["stage"])
        assert stage in LENGTHS and task.spans[:, 0].sum() == size
        assert size == stage + 1 if task.row["kind"] >= Kind.NEEDLE else size <= stage + 1
    counts = made.result[name]
    assert counts["documents"] == len(tasks) and counts["tokens"] == sum(len(task.tokens) for task in tasks)
    assert counts["bytes"] == sum(len(made.tokenizer.decode(task.tokens.tolist())) for task in tasks)


@pytest.mark.parametrize(("name", "split"), BOTH)
def test_copied_text_is_where_the_table_says_and_of_that_split_alone(made: MadeTasks, name: str, split: str) -> None:
    data = read_indexed(made.folder / split)
    copied = 0
    for number, task in enumerate(made.tasks(name)):
        assert (task.origins["task"] == number).all()
        for origin in task.origins:
            shown = task.tokens[origin["at"] :][: origin["length"]]
            assert np.array_equal(shown, data.tokens[origin["start"] :][: origin["length"]])
            first, behind = data.starts[origin["document"]], data.starts[origin["document"] + 1]
            assert first <= origin["start"] and origin["start"] + origin["length"] < behind
            copied += int(origin["length"])
        text = made.text(task.tokens)
        assert not [word for word in forbidden_words(split) if word in text]
    assert copied > 0.6 * made.result[name]["tokens"]


@pytest.mark.parametrize(("name", "split"), BOTH)
def test_a_task_is_a_framed_conversation_of_one_segment(made: MadeTasks, name: str, split: str) -> None:
    tokenizer = made.tokenizer
    for task in made.tasks(name):
        special = task.tokens[task.tokens >= len(tokenizer.ranks)]
        names = [tokenizer.special_name(int(one)) for one in special]
        messages = (len(names) - 1) // 2
        assert names == ["<|data|>", "<|end|>"] * (messages - 2) + [
            "<|user|>", "<|end|>", "<|assistant|>", "<|end|>", "<|eod|>",
        ]  # fmt: skip
        scope = MaskBit.RET_SCOPE if task.row["kind"] < Kind.NEEDLE else 0
        expected = [(ROLE_ID["data"], scope), (ROLE_ID["user"], 0), (ROLE_ID["assistant"], 0), (ROLE_ID["data"], 0)]
        assert [(span[1], (span[2], span[3])) for span in task.spans.tolist()] == [(0, one) for one in expected]
        start = int(task.row["answer_start"])
        assert task.tokens[start - 1] == tokenizer.role_ids["assistant"]
        assert task.tokens[start + int(task.row["answer_length"])] == tokenizer.end


def test_budgets_are_met_and_what_cannot_be_is_said(made: MadeTasks) -> None:
    stages = {(one["stage"], one["family"]): one for one in made.result["tasks"]["stages"]}
    for length in LENGTHS:
        for place, family in enumerate(("retrieval", "long_range")):
            one, wanted = stages[length, family], BUDGET[length][place]
            if (length, family) == (256, "long_range"):
                assert one["tokens"] == 0 and one["why_none"]
            else:
                assert wanted <= one["tokens"] < wanted + length + 1
                assert one["documents"] == sum(one["kinds"].values())
    assert any("stage 256: 0 long-range tasks" in line and "window of 256" in line for line in made.log)
    assert sum("1 documents may not be copied" in line for line in made.log) == 2
    for one in made.result["tasks-heldout"]["stages"]:
        assert one["documents"] <= EVALUATION


def _generate(folder: Path, draft: tuple[Path, Tokenizer], options: Tasks = OPTIONS, seed: int = 7) -> list[str]:
    for file in draft[0].glob("*"):
        if not file.name.startswith("tasks"):
            shutil.copy(file, folder)
    log: list[str] = []
    generate(folder, draft[1], options, LENGTHS, BUDGET, seed, log.append)
    return log


def test_the_same_bytes_again_and_others_with_another_seed(
    made: MadeTasks, draft: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    for folder, seed in ((again, 7), (other, 8)):
        folder.mkdir()
        _generate(folder, draft, seed=seed)
    for name in (*FILES, *(file.replace("tasks", "tasks-heldout", 1) for file in FILES)):
        assert (again / name).read_bytes() == (made.folder / name).read_bytes(), name
    assert (other / "tasks.bin").read_bytes() != (made.folder / "tasks.bin").read_bytes()


def test_a_share_of_zero_makes_none_and_without_any_there_are_no_files(
    draft: tuple[Path, Tokenizer], tmp_path: Path
) -> None:
    _generate(tmp_path, draft, Tasks(retrieval=0.1, window=256))
    assert (np.load(tmp_path / "tasks.npy")["kind"] < Kind.NEEDLE).all()
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    log = _generate(nothing, draft, Tasks(long_range=0.1, window=4096))
    assert not list(nothing.glob("tasks*")) and sum("left out:" in line for line in log) == 2 * len(LENGTHS)


def test_more_than_the_text_gives_is_not_made_up(draft: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    for file in draft[0].glob("[thp]*"):
        if not file.name.startswith("tasks"):
            shutil.copy(file, tmp_path)
    log: list[str] = []
    result = generate(tmp_path, draft[1], OPTIONS, (2048,), {2048: (10**8, 10**7)}, 7, log.append)
    retrieval, long_range = result["tasks"]["stages"]
    assert 0 < retrieval["tokens"] < 10**8 and 0 < long_range["tokens"] < 10**7
    assert sum("the text gives no more" in line for line in log) == 2


@pytest.mark.parametrize("missing", ["provenance.npy", "provenance-heldout.npy"])
def test_missing_provenance_is_an_error(draft: tuple[Path, Tokenizer], tmp_path: Path, missing: str) -> None:
    """Also of held-out text: taken for free to copy, it would be quoted against its owner's word."""
    for file in draft[0].glob("*.???"):
        if file.name != missing and not file.name.startswith("tasks"):
            shutil.copy(file, tmp_path)
    with pytest.raises(DataError, match=f"has no {re.escape(missing)}"):
        generate(tmp_path, draft[1], OPTIONS, (2048,), {2048: (10, 10)}, 7, print)


@pytest.mark.parametrize(("name", "split"), BOTH)
def test_each_stage_says_how_much_text_it_quotes(made: MadeTasks, name: str, split: str) -> None:
    tasks, data = made.tasks(name), read_indexed(made.folder / split)
    for one in made.result[name]["stages"]:
        retrieval = one["family"] == "retrieval"
        quoted = np.zeros(len(data.tokens), dtype=np.int64)
        for task in tasks:
            if task.row["stage"] == one["stage"] and (task.row["kind"] < Kind.NEEDLE) == retrieval:
                for origin in task.origins:
                    quoted[origin["start"] :][: origin["length"]] += 1
        assert (one["copied_tokens"], one["copied_distinct"]) == (quoted.sum(), np.count_nonzero(quoted))
    assert any(one["copied_tokens"] > one["copied_distinct"] > 0 for one in made.result["tasks"]["stages"])


def test_parts_of_one_text_are_no_records_of_each_other(draft: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    """Documents are of one topic where their numbers mod 6 are equal: without groups they are neighbours."""
    for file in draft[0].glob("[thp]*"):
        if not file.name.startswith("tasks"):
            shutil.copy(file, tmp_path)
    counts = {split: len(read_indexed(tmp_path / split).starts) - 1 for _, split in BOTH}
    groups = {split: np.arange(counts[split]) % texts for split, texts in (("train", 30), ("heldout", 12))}
    options, nothing = Tasks(retrieval=0.1, window=256), [].append
    alone = generate(tmp_path, draft[1], options, (1024,), {1024: (60_000, 0)}, 7, nothing)
    whose = {name: np.load(tmp_path / f"{name}-origins.npy") for name, _ in BOTH}
    generate(tmp_path, draft[1], options, (1024,), {1024: (60_000, 0)}, 7, nothing, groups)
    assert alone["tasks"]["documents"] > 50
    for name, split in BOTH:
        for origins, exclusive in ((whose[name], False), (np.load(tmp_path / f"{name}-origins.npy"), True)):
            assert len(origins) > 50
            apart = []
            for task in np.unique(origins["task"]):
                shown = np.unique(origins["document"][origins["task"] == task])
                apart.append(len(np.unique(groups[split][shown])) == len(shown))
            assert all(apart) == exclusive, name


def test_messages_are_encoded_as_documents_are(draft: tuple[Path, Tokenizer]) -> None:
    tokenizer = draft[1]
    parts = [("data", MaskBit.RET_SCOPE), ("data", MaskBit.RET_SCOPE), ("user", 0), ("assistant", 0), ("data", 0)]
    talk = Conversation(tokenizer)
    for number, (role, bits) in enumerate(parts):
        talk.message(role, tokenizer.encode(f"message {number}"), int(bits))
    document = Document(
        tuple(Part(f"message {n}".encode(), ROLE_ID[role], bits=int(bits)) for n, (role, bits) in enumerate(parts)),
        framed=True,
    )
    tokens, spans = talk.finish()
    encoded = encode_document(tokenizer, document)
    assert tokens.tolist() == encoded.tokens.tolist() and spans.tolist() == encoded.spans.tolist()
