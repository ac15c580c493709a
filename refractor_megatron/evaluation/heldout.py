"""Held-out loss over the whole split, as a mean and by position in the sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from data_pipeline.retrieval.neighbours import Neighbours
from data_pipeline.stream import SampleStream

from ..engines.megatron import MegatronEngine
from ..training.batches import stack


@dataclass(frozen=True)
class HeldOut:
    """Loss of one set of weights."""

    loss: float  # nats per token
    bits_per_byte: float
    tokens: int
    by_position: list[float]  # nats per token in eight equal parts of the sequence, first to last


def measure(
    engine: MegatronEngine, stream: SampleStream, micro_batch: int, neighbours: Neighbours | None = None
) -> HeldOut:
    """Loss of every held-out window (all of ``stream``, one epoch)."""
    total = torch.zeros(engine.seq_len, dtype=torch.float64)
    windows = stream.samples_per_epoch
    for first in range(0, windows, micro_batch):
        batch = stack([stream.window(i) for i in range(first, min(first + micro_batch, windows))], neighbours)
        total += engine.token_losses(batch).double().sum(0).cpu()
    mean = total / windows  # [s]
    loss = float(mean.mean())
    parts = [float(part.mean()) for part in mean.chunk(8)]
    return HeldOut(loss, loss / math.log(2) / stream.bytes_per_token, windows * engine.seq_len, parts)
