"""The training loop: step, average, tell the callbacks, stop when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from ..engines.base import StepResult
from .batches import rank_batches
from .retrieval import global_counts
from .schedule import Schedule

if TYPE_CHECKING:
    from data_pipeline.retrieval.guard import RetrievalCounts
    from data_pipeline.retrieval.neighbours import Neighbours
    from data_pipeline.samples import Stream

    from ..resilience.signals import StopRequest
    from .state import TrainState


@dataclass(frozen=True)
class Step:
    """What callbacks see of a step."""

    number: int  # 1-based
    last: bool
    stopping: bool  # a stop signal reached some rank
    result: StepResult
    lr: float
    seconds: float
    tokens: int  # of the global batch
    samples: int
    skipped: int  # updates skipped since the run began
    epoch: float
    retrieval: RetrievalCounts | None  # of the global batch; None where tier C is off
    say: Callable[[str], None]


class Callback(Protocol):
    """Something that happens after a step."""

    def after_step(self, step: Step) -> None:
        """Called on every rank that holds the callback."""


@dataclass(frozen=True)
class Recipe:
    """Numbers of the loop."""

    steps: int
    global_batch: int
    micro_batch: int
    weight_decay: float
    schedule: Schedule


def train(
    state: TrainState,
    stream: Stream,
    recipe: Recipe,
    callbacks: Sequence[Callback],
    stop: StopRequest,
    say: Callable[[str], None],
    neighbours: Neighbours | None = None,
) -> bool:
    """Train from ``state.progress.step`` to ``recipe.steps``; False when a signal ended it before."""
    engine, progress = state.engine, state.progress
    micro_batches = recipe.global_batch // (recipe.micro_batch * engine.data_size)
    while progress.step < recipe.steps:
        started = time.perf_counter()
        first = progress.step * recipe.global_batch
        number = progress.step + 1
        engine.reseed(number)
        ranks = engine.data_rank, engine.data_size
        batches = rank_batches(stream, first, recipe.micro_batch, micro_batches, *ranks, neighbours)
        lr = recipe.schedule(number)
        result = engine.train_step(batches, micro_batches, lr, recipe.weight_decay)
        if result.applied and state.ema is not None:
            state.ema.update(number)
        progress.step = number
        progress.skipped_steps += not result.applied
        step = Step(
            number=number,
            last=number == recipe.steps,
            stopping=_any_rank(stop.requested, engine.device),
            result=result,
            lr=lr,
            seconds=time.perf_counter() - started,
            tokens=recipe.global_batch * stream.seq_len,
            samples=recipe.global_batch,
            skipped=progress.skipped_steps,
            epoch=stream.position(first + recipe.global_batch),
            retrieval=global_counts(neighbours, engine),
            say=say,
        )
        for callback in callbacks:
            callback.after_step(step)
        if step.stopping:
            return step.last
    return True


def _any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank; all ranks get the same answer, so all save at the same step."""
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
