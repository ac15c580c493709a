"""One rank of a parity run: a few steps; every loss and every parameter's gradient goes to ``trace.npz``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from ..config import RunConfig
from ..engines.megatron import MegatronEngine, start_distributed, stop_distributed
from ..transformation.sharded import Shard, shards
from .batches import rank_batches
from .dataset import training_stream
from .folder import RunFolder
from .retrieval import open_retrieval
from .schedule import schedule_of


def gather(pieces: Iterable[Shard]) -> dict[str, np.ndarray[Any, Any]]:
    """Assemble global tensors on rank 0 from the pieces of all ranks (empty elsewhere); every element must be there."""
    mine = [(s.key, s.global_shape, s.index, s.data.float().cpu().numpy()) for s in pieces if s.is_main]
    everything: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(mine, everything if dist.get_rank() == 0 else None)
    whole: dict[str, np.ndarray[Any, Any]] = {}
    for piece in (p for rank in everything if rank for p in rank):
        key, shape, index, values = piece
        target = whole.setdefault(key, np.full(shape, np.nan, dtype=np.float32))
        target[index] = values.reshape(target[index].shape)
    for key, value in whole.items():
        assert not np.isnan(value).any(), f"{key} is incomplete or not a number"
    return whole


def main(path: Path, steps: int) -> None:
    """Trace ``steps`` steps of the run folder ``path``."""
    cfg = RunConfig.load(RunFolder(path).config)
    device = start_distributed()
    retrieval = open_retrieval(RunFolder(path), cfg, device)
    engine = MegatronEngine(cfg, device, bank=retrieval.bank)
    stream, neighbours = training_stream(RunFolder(path), cfg), retrieval.neighbours()
    schedule, batch, micro = schedule_of(cfg), cfg.train.global_batch, cfg.train.micro_batch
    losses: list[float] = []
    norms: list[float] = []
    routed: list[np.ndarray[Any, Any]] = []
    gradients: dict[str, list[np.ndarray[Any, Any]]] = {}
    for step in range(1, steps + 1):
        micro_batches = batch // (micro * engine.data_size)
        first, ranks = (step - 1) * batch, (engine.data_rank, engine.data_size)
        batches = rank_batches(stream, first, micro, micro_batches, *ranks, neighbours)
        losses.append(engine.accumulate(batches, micro_batches))
        for key, value in gather(shards(engine.model, lambda p: p.main_grad)).items():  # type: ignore[attr-defined]
            gradients.setdefault(key, []).append(value)
        result = engine.apply(losses[-1], schedule(step), cfg.train.optimizer.wd)
        norms.append(result.grad_norm)
        if result.router is not None:
            routed.append(result.router[:, :-2].numpy())
    if dist.get_rank() == 0:
        arrays: dict[str, Any] = {
            "loss": np.array(losses),
            "norm": np.array(norms),
            "routed": np.array(routed),
            **{k: np.stack(v) for k, v in gradients.items()},
        }
        np.savez(path / "trace.npz", **arrays)
    stop_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
