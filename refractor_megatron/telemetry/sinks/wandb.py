"""Weights & Biases in offline mode: files under the run folder, no network, nothing printed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..registry import MetricValue
from .base import flatten


class WandbSink:
    """Writes an offline run below ``run_dir/wandb``; upload it later with ``wandb sync``.

    Every launch of a run is its own offline run, grouped by the run folder's name, because W&B cannot append to an
    offline file of an earlier process.
    """

    name = "wandb"

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume_step: int) -> None:
        self._run_dir = run_dir
        self._config = dict(config)
        self._resume_step = resume_step
        self._run: Any = None

    def open(self) -> None:
        """Start the offline run. The mode is given in code, so the environment cannot turn it online."""
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, quiet=True, disable_git=True, save_code=False, disable_code=True,
            x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
        )  # fmt: skip
        name = self._run_dir.name
        self._run = wandb.init(
            project="refractor",
            group=name,
            name=name if self._resume_step == 0 else f"{name}-from-{self._resume_step}",
            dir=str(self._run_dir),
            mode="offline",
            config=self._config,
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, time_s: float, group: str, metrics: Mapping[str, MetricValue]) -> None:
        """Log one record. The step travels as a metric: an evaluation may arrive after its step's training record."""
        self._run.log({**flatten(group, metrics), "step": step, "time": time_s})

    def close(self) -> None:
        """Finish the run's files."""
        self._run.finish()
