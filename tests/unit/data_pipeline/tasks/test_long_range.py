"""Long-range tasks: solved from their text alone, and measured on their tokens alone."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.tasks import long_range, plants
from data_pipeline.tasks.compose import Kind
from data_pipeline.tasks.long_range import LongRangeTasks
from data_pipeline.tasks.text import Vocabulary, read_text
from tests.unit.data_pipeline.tasks.conftest import OPTIONS, MadeTasks, Task
from tests.unit.data_pipeline.tasks.drafts import positions

NAMES = ("tasks", "tasks-heldout")
_LINE = re.compile(rb"Remember: (?:the code of (\w+) is (\d+)|(\w+) has the same code as (\w+))\.\n")


def _tasks(made: MadeTasks, name: str) -> list[Task]:
    tasks = [task for task in made.tasks(name) if task.row["kind"] >= Kind.NEEDLE]
    assert len(tasks) >= 20
    return tasks


def _question(made: MadeTasks, task: Task) -> tuple[bytes, bytes]:
    """(question, answer) as text."""
    found = re.search(rb"<\|user\|>(.*?)<\|end\|><\|assistant\|>(.*?)<\|end\|><\|eod\|>$", made.text(task.tokens), re.S)
    assert found
    return found[1], found[2]


def _solve(context: bytes, question: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """The answer, worked out from the text, and the bytes of the lines that were needed for it."""
    quoted = re.fullmatch(rb'What follows these words above\?\n"(.*)"', question, re.S)
    if quoted:
        assert context.count(quoted[1]) == 1
        at = context.index(quoted[1])
        return context[at + len(quoted[1]) :], [(at, -1)]
    lines = {one[1] or one[3]: one for one in _LINE.finditer(context)}
    asked = re.search(rb"codes? of ([\w, ]+)", question.replace(b", in this order", b""))
    assert asked
    values, used = [], []
    for key in asked[1].split(b", "):
        line = lines[key]
        used.append(line.span())
        while line[2] is None:
            line = lines[line[4]]
            used.append(line.span())
        values.append(line[2])
    return b", ".join(values), used


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_follows_from_the_context(made: MadeTasks, name: str) -> None:
    for task in _tasks(made, name):
        context = made.tokenizer.decode(task.tokens[: task.spans[0, 0]].tolist())
        question, answer = _question(made, task)
        solved, used = _solve(context, question)
        if task.row["kind"] == Kind.QUOTE:
            assert solved.startswith(answer) and context.count(answer) == 1
        else:
            assert solved == answer
            assert all(context.count(value) == 1 for value in answer.split(b", "))
            lines = len(_LINE.findall(context))
            assert lines > len(used), "there are others like it"
        assert len(used) == {Kind.NEEDLE: 1, Kind.QUOTE: 1}.get(task.row["kind"], len(used))
        assert task.row["kind"] not in (Kind.HOPS, Kind.RECALL) or len(used) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_the_share_beyond_the_window_is_what_the_tokens_say(made: MadeTasks, name: str) -> None:
    for task in _tasks(made, name):
        length = int(task.spans[0, 0])
        context = made.tokenizer.decode(task.tokens[:length].tolist())
        question, answer = _question(made, task)
        _, used = _solve(context, question)
        if task.row["kind"] == Kind.QUOTE:
            used = [(used[0][0], context.index(answer) + len(answer))]
        places = positions(made.tokenizer, task.tokens[:length])
        words = task.tokens[:length] < len(made.tokenizer.ranks)
        evidence = np.zeros(length, dtype=bool)
        for low, high in used:
            evidence |= (places[:-1] >= low) & (places[1:] <= high) & words
        stated = np.zeros(length, dtype=bool)
        for low, high in task.row["evidence"]:
            stated[max(low, 0) : max(high, 0)] = True
        assert np.array_equal(evidence, stated)
        assistant = int(np.flatnonzero(task.tokens == made.tokenizer.role_ids["assistant"])[0])
        beyond = np.flatnonzero(evidence) <= assistant - OPTIONS.window  # what the token at ``assistant`` cannot read
        assert beyond.mean() > 0.8 and task.row["evidence_share"] == np.float32(beyond.mean())


@pytest.mark.parametrize("name", NAMES)
def test_evidence_lies_all_over_the_far_text(made: MadeTasks, name: str) -> None:
    tasks = [task for task in _tasks(made, name) if task.row["stage"] == 2048]
    place = [
        float(first) / (2048 - OPTIONS.window) for task in tasks for first, _ in task.row["evidence"] if first >= 0
    ]
    assert min(place) < 0.2 and max(place) > 0.7 and 0.3 < np.mean(place) < 0.65


def test_lines_that_are_not_asked_for_stand_near_the_answer_too(made: MadeTasks) -> None:
    near = 0
    for task in _tasks(made, "tasks"):
        length = int(task.spans[0, 0])
        near += len(_LINE.findall(made.tokenizer.decode(task.tokens[length - OPTIONS.window : length].tolist())))
    assert near > 20


def _maker(made: MadeTasks) -> LongRangeTasks:
    vocabulary = Vocabulary(made.tokenizer)
    return LongRangeTasks(read_text(made.folder, "train", vocabulary), vocabulary, OPTIONS.window, 7)


@pytest.mark.parametrize(("far", "kept"), [(79, False), (80, False), (81, True), (100, True)])
def test_a_task_with_too_little_evidence_beyond_the_window_is_rejected(made: MadeTasks, far: int, kept: bool) -> None:
    maker = _maker(made)
    one = next(task for task in maker.of_stage(2047, 2048) if task is not None)
    edge = one.answer[0] - OPTIONS.window
    checked = maker._checked(replace(one, evidence=((edge - far, edge), (edge, edge + 100 - far))))
    assert (checked is not None) == kept and maker.rejected.total() == (not kept)


def test_a_planted_name_that_stands_in_the_text_rejects_the_task(
    made: MadeTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = _maker(made)
    monkeypatch.setitem(
        long_range._FORMS, Kind.NEEDLE, lambda draws, lines: replace(plants.needle(draws, lines), names=("xt",))
    )
    stage = maker.of_stage(2047, 2048)
    first = [next(stage) for _ in range(4)]
    assert [one is None for one in first] == [True, False, False, False]
    assert maker.rejected == {"a planted name stands in the text": 1}


def test_a_context_is_one_document_or_whole_messages_of_one_source_first(made: MadeTasks) -> None:
    sources = np.load(made.folder / "provenance.npy")["source"]
    text = read_text(made.folder, "train", Vocabulary(made.tokenizer))
    usable = text.document[text.stop - text.start >= long_range._SHORTEST]
    alone = several = 0
    for task in _tasks(made, "tasks"):
        documents = task.origins["document"]
        ends = np.flatnonzero(task.tokens[: task.spans[0, 0]] == made.tokenizer.end)
        messages = np.searchsorted(ends, task.origins["at"])
        assert len(set(zip(messages.tolist(), documents.tolist(), strict=True))) == len(set(messages.tolist()))
        change = np.flatnonzero(np.diff(sources[documents]))
        assert len(change) <= 1
        if len(change):  # only when its source is used up
            left = set(usable[sources[usable] == sources[documents[0]]]) - set(documents.tolist())
            assert not left
        alone, several = alone + (len(ends) == 1), several + (len(ends) > 1)
    assert alone and several
