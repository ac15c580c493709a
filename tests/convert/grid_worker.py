"""One of four ranks: on every grid, load one checkpoint and save what was loaded. Arguments: run, root, overrides."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import torch.distributed as dist

from refractor_megatron.checkpoint.convert.megatron_folder import find_step
from refractor_megatron.checkpoint.store import Store
from refractor_megatron.engines.megatron import MegatronEngine, start_distributed, stop_distributed
from refractor_megatron.training.state import TrainState
from tests.engine import tiny

RANKS = 4
#: tensor, pipeline and expert parallelism; the rest of the ranks share the data.
GRIDS = [grid for grid in product((1, 2), repeat=3) if grid != (1, 1, 1)]


def name_of(grid: tuple[int, ...]) -> str:
    return "".join(f"{axis}{n}" for axis, n in zip(("tp", "pp", "ep"), grid, strict=True))


def main(run: Path, root: Path, overrides: list[str]) -> None:
    device = start_distributed()
    for tp, pp, ep in GRIDS:
        cfg = tiny(*overrides, f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.ep={ep}")
        engine = MegatronEngine(cfg, device)
        state = TrainState(cfg, engine, "digest")
        state.load(Store(run / "checkpoints", 2), find_step(run), optimizer=False)
        out = root / name_of((tp, pp, ep))
        state.save(Store(out / "checkpoints", 2))
        if dist.get_rank() == 0:
            cfg.save(out / "config.yaml")
    stop_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
