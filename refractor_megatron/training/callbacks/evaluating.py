"""Held-out loss of the raw and the averaged weights, on the same samples every time, and what attention did there."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING

from data_pipeline.retrieval.neighbours import Neighbours
from data_pipeline.stream import SampleStream

from ...distinction.lowerings import DENSE_LIMIT
from ...distinction.measure import MaskMeasure, measure_mask
from ...errors import ConfigError
from ...fabric.measure import AttentionProbe, probing
from ...telemetry.hub import Telemetry
from ...telemetry.registry import MetricValue
from ..batches import rank_batches
from ..ema import WeightEMA
from ..loop import Step
from ..retrieval import global_counts, retrieval_metrics

if TYPE_CHECKING:
    from ...engines.megatron import MegatronEngine

#: Median entropy of masks and of attention below which something has collapsed (spec section 11).
COLLAPSED = 0.1


class Evaluating:
    """Evaluates every N steps on the first ``batches`` micro-batches of the held-out split."""

    def __init__(
        self,
        engine: MegatronEngine,
        ema: WeightEMA | None,
        stream: SampleStream,
        telemetry: Telemetry | None,
        neighbours: Neighbours | None = None,
        *,
        every: int,
        batches: int,
        micro_batch: int,
        attention_rows: int,
    ) -> None:
        """``attention_rows``: query rows per sample on which attention is measured, 0 = masks only."""
        if batches % engine.data_size:
            raise ConfigError(
                f"evaluation.batches={batches} is not a multiple of the {engine.data_size} data-parallel ranks: "
                f"set evaluation.batches={-(-batches // engine.data_size) * engine.data_size}."
            )
        self.engine, self.ema, self.stream, self.telemetry = engine, ema, stream, telemetry
        self.neighbours = neighbours
        self.every, self.batches, self.micro_batch = every, batches, micro_batch
        self.attention_rows = attention_rows

    def after_step(self, step: Step) -> None:
        """Evaluate when due; on the reporter rank the result goes to the telemetry hub."""
        if step.number % self.every == 0 and not step.stopping:
            probe = AttentionProbe(self.engine.plan.n_layers, self.attention_rows, seed=step.number)
            raw = self._measure(step, "raw", probe)
            message = f"held-out {raw:.4f} nats/token"
            if self.ema is not None:
                with self.ema.swapped_in():
                    message += f", EMA {self._measure(step, 'ema'):.4f}"
            step.say(message)

    def _measure(self, step: Step, weights: str, probe: AttentionProbe | None = None) -> float:
        micro_batches = self.batches // self.engine.data_size
        ranks = self.engine.data_rank, self.engine.data_size
        batches = rank_batches(self.stream, 0, self.micro_batch, micro_batches, *ranks, self.neighbours)
        with nullcontext() if probe is None else probing(self.engine.model, probe, self.engine.device):
            loss = self.engine.eval_loss(batches, micro_batches)
        counts = global_counts(self.neighbours, self.engine)
        if self.telemetry is not None:
            metrics: dict[str, MetricValue] = {
                "loss": loss,
                "bits_per_byte": loss / math.log(2) / self.stream.bytes_per_token,
                "tokens": self.batches * self.micro_batch * self.stream.seq_len,
            }
            if counts is not None:
                metrics |= retrieval_metrics(counts)
                metrics["retrieval_similarity"] = [float(count) for count in counts.histogram]
            if probe is not None:
                measured = self._flow(probe)
                metrics |= measured
                for sentence in alerts(measured):
                    step.say(sentence)
            self.telemetry.log_eval(step.number, weights, metrics)
        return loss

    def _flow(self, probe: AttentionProbe) -> dict[str, MetricValue]:
        """Registered metrics of masks and attention."""
        metrics: dict[str, MetricValue] = {"role_share": self._masks.role_share}
        if self._masks.entropy is not None and self._masks.entropy_median is not None:
            metrics |= {"mask_entropy": self._masks.entropy, "mask_entropy_median": self._masks.entropy_median}
        return metrics | probe.plan_metrics(self.micro_batch * self.stream.seq_len) | probe.attention_metrics()

    @cached_property
    def _masks(self) -> MaskMeasure:
        """Of all samples evaluated, which are the same every time."""
        samples = range(self.batches * self.micro_batch)
        return measure_mask((self.stream.sample(i).records[:-1] for i in samples), self.engine.rules)


def alerts(metrics: dict[str, MetricValue]) -> list[str]:
    """Sentences for the person who watches; empty while all is well."""

    def value(name: str) -> float:
        found = metrics.get(name, math.nan)
        assert isinstance(found, int | float)
        return found

    sentences = []
    if value("invalid_edges") > 0:
        sentences.append(
            f"ALERT: the executed mask lets {value('invalid_edges'):.0f} illegal edges through on the audited rows: "
            f"stop, and go on by another relation.backend (dense takes at most {DENSE_LIMIT} tokens), torch or device"
        )
    if value("mask_entropy_median") < COLLAPSED:
        sentences.append(
            f"ALERT: median mask entropy {value('mask_entropy_median'):.2f} is below {COLLAPSED}: the rules of "
            "safety.masks leave most tokens next to nothing to read; loosen them, or check segments and roles"
        )
    if value("attention_entropy_median") < COLLAPSED:
        sentences.append(
            f"ALERT: median attention entropy {value('attention_entropy_median'):.2f} is below {COLLAPSED}: reduce "
            "sparsity (relation.local.window) or add summaries (relation.global.summaries_per_block)"
        )
    return sentences
