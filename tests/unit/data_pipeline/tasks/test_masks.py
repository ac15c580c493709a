"""Who may read the evidence: asked of the compiled mask rules."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.tasks.compose import Kind
from refractor_megatron.distinction.intervals import compile_intervals
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.rules import CompiledRules, compile_rules
from tests.unit.data_pipeline.tasks.conftest import OPTIONS, MadeTasks, Task

#: Retrieved passages inform questions and answers only, as in the specification's first example.
SCOPED = [
    {"name": "passages", "when": {"bits": ["RET_SCOPE"]}, "allow_write_to": ["user", "assistant", "data"]},
]


def _read(task: Task, rules: CompiledRules, window: int | None, query: int) -> np.ndarray:
    """The evidence tokens that ``query`` reads, bool."""
    lengths = task.spans[:, 0]
    records = np.concatenate([np.zeros((len(lengths), 1), dtype=np.int64), task.spans[:, 1:]], axis=1)
    rows = compile_intervals(np.repeat(records, lengths, axis=0), rules, LocalPattern(window=window)).rows
    read = np.zeros(len(task.tokens), dtype=bool)
    for low, high in rows.of(query):
        read[low:high] = True
    stretches = [(low, high) for low, high in task.row["evidence"] if low >= 0]
    return np.concatenate([read[low:high] for low, high in stretches])


def _one_of_each(made: MadeTasks) -> list[Task]:
    tasks = {int(task.row["kind"]): task for task in made.tasks()}
    assert len(tasks) == len(Kind)
    return list(tasks.values())


@pytest.mark.parametrize("rules", [[], SCOPED], ids=["default", "scoped"])
def test_the_answer_may_read_all_of_its_evidence(made: MadeTasks, rules: list[dict[str, object]]) -> None:
    compiled = compile_rules(rules)
    for task in _one_of_each(made):
        first = int(task.row["answer_start"]) - 1
        for query in (first, first + int(task.row["answer_length"]) - 1):
            assert _read(task, compiled, None, query).all()


def test_a_local_window_reads_none_of_what_is_counted_as_beyond_it(made: MadeTasks) -> None:
    for task in _one_of_each(made):
        read = _read(task, compile_rules([]), OPTIONS.window, int(task.row["answer_start"]) - 1)
        assert np.float32(1 - read.mean()) == task.row["evidence_share"]
        if task.row["kind"] >= Kind.NEEDLE:
            assert not read.all()


def test_records_are_in_the_scope_of_retrieval(made: MadeTasks) -> None:
    """A rule against it takes the evidence away: the bit is really on those tokens."""
    closed = compile_rules([{"name": "none", "when": {"bits": ["RET_SCOPE"]}, "allow_write_to": ["data"]}])
    for task in _one_of_each(made):
        read = _read(task, closed, None, int(task.row["answer_start"]) - 1)
        assert read.any() == (task.row["kind"] >= Kind.NEEDLE)
