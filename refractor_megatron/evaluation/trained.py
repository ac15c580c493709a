"""The newest checkpoint of a run as a model on this process, whatever grid trained it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from data_pipeline.retrieval.neighbours import Neighbours

from ..checkpoint.store import Store
from ..config import RunConfig
from ..engines.megatron import MegatronEngine, start_distributed
from ..errors import CheckpointError, ConfigError
from ..training.dataset import heldout_stream
from ..training.folder import RunFolder
from ..training.retrieval import open_retrieval
from ..training.state import TrainState
from ..transformation.assemble_gpt import Grid


@dataclass(frozen=True)
class Trained:
    """A run's configuration, its engine with the raw weights loaded, and the state they came from."""

    cfg: RunConfig
    engine: MegatronEngine
    state: TrainState
    neighbours: Neighbours | None

    def weights(self, name: str) -> contextlib.AbstractContextManager[object]:
        """Within it the engine has the ``raw`` or the averaged (``ema``) weights.

        Errors: ``ConfigError`` when the run keeps no average.
        """
        if name == "raw":
            return contextlib.nullcontext()
        if self.state.ema is None:
            raise ConfigError("the run was trained without averaged weights (train.ema.enabled): give --weights raw.")
        return self.state.ema.swapped_in()


def load_trained(folder: RunFolder) -> Trained:
    """Start a world of one and load the newest checkpoint's weights.

    Errors: ``CheckpointError`` when there is none or it belongs to another run.
    """
    cfg = RunConfig.load(folder.config)
    device = start_distributed()
    retrieval = open_retrieval(folder, cfg, device)
    engine = MegatronEngine(cfg, device, grid=Grid(), bank=retrieval.bank)
    state = TrainState(cfg, engine, heldout_stream(folder, cfg).digest, retrieval.digest)
    store = Store(folder.checkpoints, cfg.checkpoint.keep)
    newest = store.latest()
    if newest is None:
        raise CheckpointError(f"{folder.checkpoints} holds no complete checkpoint: train first.")
    state.check_identity(newest)
    state.load(store, newest, optimizer=False)
    return Trained(cfg, engine, state, retrieval.neighbours())
