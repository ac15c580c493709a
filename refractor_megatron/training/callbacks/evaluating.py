"""Held-out loss of the raw and the averaged weights, on the same samples every time."""

from __future__ import annotations

import math

from data_pipeline.stream import SampleStream

from ...engines.base import Engine
from ...errors import ConfigError
from ...telemetry.hub import Telemetry
from ..batches import rank_batches
from ..ema import WeightEMA
from ..loop import Step


class Evaluating:
    """Evaluates every N steps on the first ``batches`` micro-batches of the held-out split."""

    def __init__(
        self,
        engine: Engine,
        ema: WeightEMA | None,
        stream: SampleStream,
        telemetry: Telemetry | None,
        *,
        every: int,
        batches: int,
        micro_batch: int,
    ) -> None:
        if batches % engine.data_size:
            raise ConfigError(
                f"evaluation.batches={batches} is not a multiple of the {engine.data_size} data-parallel ranks: "
                f"set evaluation.batches={-(-batches // engine.data_size) * engine.data_size}."
            )
        self.engine, self.ema, self.stream, self.telemetry = engine, ema, stream, telemetry
        self.every, self.batches, self.micro_batch = every, batches, micro_batch

    def after_step(self, step: Step) -> None:
        """Evaluate when due; on the reporter rank the result goes to the telemetry hub."""
        if step.number % self.every == 0 and not step.stopping:
            raw = self._measure(step, "raw")
            message = f"held-out {raw:.4f} nats/token"
            if self.ema is not None:
                with self.ema.swapped_in():
                    message += f", EMA {self._measure(step, 'ema'):.4f}"
            step.say(message)

    def _measure(self, step: Step, weights: str) -> float:
        micro_batches = self.batches // self.engine.data_size
        batches = rank_batches(
            self.stream, 0, self.micro_batch, micro_batches, self.engine.data_rank, self.engine.data_size
        )
        loss = self.engine.eval_loss(batches, micro_batches)
        if self.telemetry is not None:
            metrics = {
                "loss": loss,
                "bits_per_byte": loss / math.log(2) / self.stream.bytes_per_token,
                "tokens": self.batches * self.micro_batch * self.stream.seq_len,
            }
            self.telemetry.log_eval(step.number, weights, metrics)
        return loss
