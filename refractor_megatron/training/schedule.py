"""Learning rate: linear warm-up, cosine to a floor, then constant or a Robbins-Monro tail (reference 6.8).

A constant floor for ever has Σ lr² = ∞; stopping after the cosine has Σ lr < ∞. The tail lr ∝ t^-p with 1/2 < p ≤ 1
satisfies both Robbins-Monro conditions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.schema import RunConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a pure function of the step (1-based: the first update is step 1)."""

    peak: float
    floor: float
    warmup_steps: int
    cosine_steps: int  # step at which the cosine reaches the floor
    tail: str  # "constant" | "rm"
    power: float

    def __call__(self, step: int) -> float:
        """Learning rate of update ``step``."""
        assert step >= 1
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if step <= self.cosine_steps:
            progress = (step - self.warmup_steps) / (self.cosine_steps - self.warmup_steps)
            return self.floor + (self.peak - self.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
        if self.tail == "constant":
            return self.floor
        return self.floor * math.pow(self.cosine_steps / step, self.power)

    @property
    def satisfies_robbins_monro(self) -> bool:
        """Whether Σ lr = ∞ and Σ lr² < ∞ if training went on for ever."""
        return self.tail == "rm" and 0.5 < self.power <= 1.0 and self.floor > 0


def schedule_of(cfg: RunConfig) -> Schedule:
    """The schedule of a configuration."""
    schedule = cfg.train.schedule
    assert schedule.cosine.steps is not None, "compose() materialises cosine.steps"
    return Schedule(
        peak=cfg.train.optimizer.lr,
        floor=schedule.cosine.min_lr,
        warmup_steps=schedule.warmup_steps,
        cosine_steps=schedule.cosine.steps,
        tail=schedule.tail.type,
        power=schedule.tail.power,
    )
