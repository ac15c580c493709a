"""Turns a step into metrics, for the sinks and for the person who watches."""

from __future__ import annotations

import math
import resource
import sys
from typing import Any

from ...telemetry.console import Console
from ...telemetry.hub import Telemetry
from ..loop import Step
from ..retrieval import retrieval_metrics


class Reporting:
    """Logs every step to the telemetry hub and the console (reporter rank only)."""

    def __init__(self, console: Console, telemetry: Telemetry, *, every: int, flops_per_token: float, peak: float):
        self.console, self.telemetry, self.every = console, telemetry, every
        self.flops_per_token, self.peak = flops_per_token, peak

    def after_step(self, step: Step) -> None:
        """Log."""
        metrics = self.metrics(step)
        if step.number % self.every == 0 or step.last or step.stopping:
            self.telemetry.log(step.number, metrics)
        self.console.step(step.number, metrics)
        if not step.result.applied:
            self.console.message(f"step {step.number}: loss or gradient not finite, update skipped")

    def metrics(self, step: Step) -> dict[str, Any]:
        """Registered metrics of one step."""
        result, rate = step.result, step.tokens / step.seconds
        metrics: dict[str, Any] = {
            "loss": result.loss,
            "lm_loss": result.loss,
            "lr": step.lr,
            "grad_norm": result.grad_norm,
            "step_ms": step.seconds * 1e3,
            "tokens_per_s": rate,
            "mfu": rate * self.flops_per_token / self.peak,
            "epoch": step.epoch,
            "tokens_seen": step.number * step.tokens,
            "samples_seen": step.number * step.samples,
            "skipped_steps": step.skipped,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            / (2**20 if sys.platform == "darwin" else 1024),
        }
        if result.router is not None:
            metrics |= router_metrics(result.router)
        if step.retrieval is not None:
            metrics |= retrieval_metrics(step.retrieval)
        return metrics


def router_metrics(table: Any) -> dict[str, Any]:
    """Entropy and load from the counters of one step.

    Args:
        table: float64 [layers, E + 2]: tokens sent to each expert, Σ normalised entropy, tokens routed.

    Returns:
        mean and per-layer gate entropy; each expert's share of the load times E (1 = balanced), mean over layers, and
        its maximum over layers; exact KL(u ‖ 1/E) in nats, mean over layers (reference 6.1).
    """
    experts = table.shape[1] - 2
    usage = table[:, :experts] / table[:, :experts].sum(1, keepdim=True)  # [layers, E]
    entropy = table[:, experts] / table[:, experts + 1]
    kl = (usage * (usage.clamp_min(1e-30).log() + math.log(experts))).sum(1)
    return {
        "router_entropy": float(entropy.mean()),
        "router_entropy_layer": entropy.tolist(),
        "expert_load": (usage.mean(0) * experts).tolist(),
        "expert_load_max": float(usage.max() * experts),
        "lb_loss": float(kl.mean()),
    }
