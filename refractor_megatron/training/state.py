"""TrainState: everything a run resumes, and the only thing that checkpoints know.

There is no RNG and no loader state to save: random choices are reseeded from (seed, step), and a sample is a function
of its global index.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import __version__
from ..checkpoint import manifest as manifests
from ..checkpoint.store import Store
from ..compat.megatron import MEGATRON_VERSION
from ..config.schema import RunConfig
from ..engines.megatron import MegatronEngine
from ..errors import CheckpointError
from ..transformation.sharded import shards
from .ema import WeightEMA
from .start import load_first_weights
from .weights import StartWeights


@dataclass
class Progress:
    """Counters that continue across a restart."""

    step: int = 0  # updates done
    skipped_steps: int = 0  # of them, not applied because something was not finite


class TrainState:
    """Weights, optimizer, EMA and progress of one run."""

    def __init__(
        self, cfg: RunConfig, engine: MegatronEngine, data_digest: str, retrieval_digest: str | None = None
    ) -> None:
        self.engine = engine
        self.ema = WeightEMA(engine.model, cfg.train.ema.decay) if cfg.train.ema.enabled else None
        self.progress = Progress()
        self.identity = {
            "config_hash": cfg.hash,
            "fixed_hash": cfg.fixed_hash,
            "data_digest": data_digest,
            "retrieval_digest": retrieval_digest,
            "rules_hash": engine.rules.digest,
            "package_version": __version__,
            "megatron_version": MEGATRON_VERSION,
            "grid": {**asdict(engine.grid), "dp": engine.data_size},
        }
        self.bytes_needed = _checkpoint_bytes(engine, self.ema is not None)

    def save(self, store: Store) -> Path:
        """Write a checkpoint of the current step."""
        return store.save(
            self._sharded(loading=False), {**self.identity, "step": self.progress.step}, self.bytes_needed
        )

    def resume(self, store: Store) -> bool:
        """Load the newest complete checkpoint; False when there is none.

        Raises:
            CheckpointError: it is damaged, or of another configuration or dataset.
        """
        folder = store.latest()
        if folder is None:
            return False
        self.check_identity(folder)
        self._check_expert_grid(folder)
        self.load(store, folder)
        return True

    def start_from(self, cfg: RunConfig, store: Store, start: StartWeights) -> list[str]:
        """Take another run's raw weights at step 0; the average starts equal to them, the optimizer afresh.

        Returns the names of the tensors that the other model does not have. Raises ``CheckpointError`` for weights that
        do not fit. With bf16 weights the optimizer's fp32 copies start from the rounded ones, on every grid alike.
        """
        new = load_first_weights(cfg, self.engine, store, start)
        if self.ema is not None:
            self.ema = WeightEMA(self.engine.model, self.ema.decay)
        return new

    def load(self, store: Store, folder: Path, *, optimizer: bool = True) -> None:
        """Load the state of ``folder``; without the optimizer (evaluation) whatever grid wrote it."""
        loaded = store.load(folder, self._sharded(loading=True, optimizer=optimizer))
        # what is not sharded comes back unasked: without the optimizer, its parameter groups are of no use
        self.engine.load(loaded["model"], loaded["optimizer"] if optimizer else None)
        if self.ema is not None:
            self.ema.load(loaded["ema"])
        self.progress = Progress(**loaded["progress"])

    def check_identity(self, folder: Path) -> None:
        """Refuse a checkpoint of another run."""
        found = manifests.read(folder)
        ways = {
            "fixed_hash": "use the configuration that made it (config.yaml beside it), or another --out",
            "data_digest": "use the dataset it was trained on, or another --out",
            "retrieval_digest": "use the retrieval index it was trained with, or another --out",
            "rules_hash": "use the mask rules it was trained with, or another --out",
        }
        for name, way_out in ways.items():
            theirs, ours = getattr(found, name), self.identity[name]
            if theirs != ours:
                raise CheckpointError(f"{folder} has {name} {theirs}, this run has {ours}: {way_out}.")

    def _check_expert_grid(self, folder: Path) -> None:
        """Upstream keeps expert parameters in an optimizer of their own once EP > 1, under other names."""
        theirs, ours = manifests.read(folder).grid["ep"], self.engine.grid.ep
        if (theirs > 1) != (ours > 1):
            raise CheckpointError(
                f"{folder} was written with parallel.ep={theirs} and Megatron cannot move optimizer state between "
                f"EP = 1 and EP > 1: resume with parallel.ep={theirs}, not {ours}."
            )

    def _sharded(self, loading: bool, optimizer: bool = True) -> dict[str, Any]:
        model = self.engine.model_state()
        state: dict[str, Any] = {"model": model}
        if optimizer:
            state["optimizer"] = self.engine.optimizer_state(model, loading)
        if self.ema is not None:
            state["ema"] = self.ema.sharded_state()
        state["progress"] = asdict(self.progress)
        return state


def _checkpoint_bytes(engine: MegatronEngine, ema: bool) -> int:
    """Size of a whole checkpoint: weights, two Adam moments, fp32 masters and EMA where kept."""
    own = sum(shard.data.numel() for shard in shards(engine.model) if shard.is_main)
    total = torch.tensor([float(own)], dtype=torch.float64, device=engine.device)
    dist.all_reduce(total)
    per_parameter = 4 + 8 + (2 if engine.config.bf16 else 0) + (4 if ema else 0)
    return int(total.item() * per_parameter)
