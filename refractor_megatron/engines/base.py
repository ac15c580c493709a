"""What the training loop needs from an engine, and nothing more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch: next-token pairs and the records of the inputs."""

    tokens: Tensor  # int64 [b, s]
    labels: Tensor  # int64 [b, s]
    records: Tensor  # int32 [b, s, 4 + R] = (document, segment, role, mask bits, ids of R readable records or -1)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step found, the same on every rank."""

    loss: float  # nats per token, mean over the global batch
    grad_norm: float  # global L2 norm before clipping
    applied: bool  # False: loss or gradient was not finite and the update was skipped
    router: Tensor | None  # float64 [layers, E + 2]: tokens per expert, Σ entropy, tokens; None without experts


class Engine(Protocol):
    """Builds a model for one grid and steps it."""

    device: torch.device
    model: Any
    data_rank: int  # this rank's place among the data-parallel ranks
    data_size: int
    is_reporter: bool  # the one rank that speaks for the run

    def reseed(self, step: int) -> None:
        """Make every random choice of a step a function of (seed, step)."""

    def train_step(self, batches: Iterator[Batch], micro_batches: int, lr: float, weight_decay: float) -> StepResult:
        """Forward, backward, clip, update."""

    def eval_loss(self, batches: Iterator[Batch], micro_batches: int) -> float:
        """Mean loss in nats per token over the data-parallel group's batches; weights untouched."""

    def model_state(self) -> dict[str, Any]:
        """Sharded state dict of the weights."""

    def optimizer_state(self, model_state: dict[str, Any], loading: bool) -> dict[str, Any]:
        """Sharded state dict of the optimizer."""

    def load(self, model_state: dict[str, Any], optimizer_state: dict[str, Any] | None) -> None:
        """Take loaded state; without an optimizer state its fp32 copies follow the weights."""
