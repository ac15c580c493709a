"""How a task that failed elsewhere is told here: a sentence for what the user can mend, a traceback for the rest."""

from __future__ import annotations

from typing import Any

from data_pipeline.engine.tasks import Stage
from refractor_megatron import errors
from refractor_megatron.errors import DataError, RefractorError


class TaskFailed(RuntimeError):
    """A task raised what no user can mend; the message holds its traceback."""


def failure(stage: Stage, index: int, answer: dict[str, Any]) -> Exception | None:
    """The error of an answer of ``worker.outcome``: a ``RefractorError`` is the same class with the same sentence."""
    if not answer:
        return None
    if answer["error"] == "MemoryError":
        return died(stage, index, "ran out of memory")
    if answer["error"] is None:
        return TaskFailed(f"stage {stage.name}, task {index} of {stage.count}:\n{answer['message']}")
    kind: type[RefractorError] = getattr(errors, answer["error"], RefractorError)
    return kind(answer["message"])


def died(stage: Stage, index: int, how: str) -> DataError:
    """The sentence for a task that ended without an answer."""
    return DataError(
        f"Task {index} of stage {stage.name} {how}; what is done is kept: run again, "
        "with a smaller data.engine.workers if memory ran out."
    )
