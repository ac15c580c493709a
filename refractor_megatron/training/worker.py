"""One rank of a run: ``python -m refractor_megatron.training.worker RUN_FOLDER`` (alone, or under torchrun or srun).

Everything it needs is in the run folder: the resolved configuration and the dataset's place.
"""

from __future__ import annotations

import sys

from ..resilience.signals import EXIT_STOPPED, StopRequest

_STOP = StopRequest().install() if __name__ == "__main__" else StopRequest()  # before torch: a signal may come early

import json  # noqa: E402
import os  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from ..checkpoint.store import Store  # noqa: E402
from ..config import RunConfig  # noqa: E402
from ..engines.megatron import MegatronEngine, start_distributed, stop_distributed  # noqa: E402
from ..errors import RefractorError  # noqa: E402
from ..telemetry.console import Console  # noqa: E402
from ..telemetry.hub import Telemetry  # noqa: E402
from .callbacks import Checkpointing, Evaluating, Reporting  # noqa: E402
from .dataset import heldout_stream, training_stream  # noqa: E402
from .folder import RunFolder, write_json  # noqa: E402
from .loop import Callback, Recipe, train  # noqa: E402
from .retrieval import Retrieval, open_retrieval  # noqa: E402
from .schedule import schedule_of  # noqa: E402
from .state import TrainState  # noqa: E402
from .utilisation import flops_per_token, peak_of  # noqa: E402
from .weights import StartWeights  # noqa: E402

#: Keys whose reader comes after the last step (``evaluation.final``, ``hf.from_run``).
READ_AFTER_TRAINING = {
    "evaluation.samples",
    "evaluation.sample_tokens",
    "memory.kv.chunk",
    "memory.kv.compress_ratio",
}


def run(path: Path, stop: StopRequest) -> int:
    """Train the run in ``path`` to its end or to a signal; returns the exit code."""
    folder = RunFolder(path)
    cfg = RunConfig.load(folder.config)
    device = start_distributed()
    try:
        retrieval = open_retrieval(folder, cfg, device)
        engine = MegatronEngine(cfg, device, bank=retrieval.bank)
        stream = training_stream(folder, cfg)
        state = TrainState(cfg, engine, stream.digest, retrieval.digest)
        store = Store(folder.checkpoints, cfg.checkpoint.keep)
        resumed = state.resume(store)
        start = None if resumed else StartWeights.read(folder)
        new = [] if start is None else state.start_from(cfg, store, start)
        console, callbacks = _callbacks(folder, cfg, state, store, retrieval)
        say = console.message if console is not None else _silent
        say(f"resumed after step {state.progress.step}" if resumed else _headline(engine))
        if start is not None:
            say(_beginning(start, new))
        recipe = Recipe(
            cfg.train.steps,
            cfg.train.global_batch,
            cfg.train.micro_batch,
            cfg.train.optimizer.wd,
            schedule_of(cfg),
        )
        _require_all_read(cfg, folder)
        try:
            done = train(state, stream, recipe, callbacks, stop, say, retrieval.neighbours())
        finally:
            for callback in callbacks:
                if isinstance(callback, Reporting):
                    callback.console.close()
                    callback.telemetry.close()
        return 0 if done else EXIT_STOPPED
    finally:
        stop_distributed()


def _callbacks(
    folder: RunFolder, cfg: RunConfig, state: TrainState, store: Store, retrieval: Retrieval
) -> tuple[Console | None, list[Callback]]:
    engine = state.engine
    callbacks: list[Callback] = []
    console = telemetry = None
    logging = cfg.telemetry
    if engine.is_reporter:
        peak = peak_of(engine)
        write_json(
            folder.device,
            {
                "device": torch.cuda.get_device_name() if engine.device.type == "cuda" else "cpu",
                "peak_name": peak.name,
                "peak_flops": peak.flops,
                "ranks": dist.get_world_size(),
            },
        )
        console = Console(cfg.train.steps, state.progress.step, peak.name, peak.flops, sys.stderr)
        telemetry = Telemetry(
            folder.path,
            tensorboard=logging.tensorboard,
            wandb=logging.wandb,
            config=cfg.to_dict(),
            config_hash=cfg.hash,
            resume_step=state.progress.step,
            warn=console.message,
        )
        callbacks.append(
            Reporting(
                console,
                telemetry,
                every=logging.every,
                flops_per_token=flops_per_token(engine),
                peak=peak.flops * dist.get_world_size(),
            )
        )
    evaluation = cfg.evaluation
    callbacks.append(
        Evaluating(
            engine,
            state.ema,
            heldout_stream(folder, cfg),
            telemetry,
            retrieval.neighbours(),
            every=evaluation.every,
            batches=evaluation.batches,
            micro_batch=cfg.train.micro_batch,
            attention_rows=logging.attention_rows,
        )
    )
    callbacks.append(Checkpointing(state, store, cfg.checkpoint.every))
    return console, callbacks


def _silent(text: str) -> None:
    """Ranks other than the reporter say nothing."""


def _headline(engine: MegatronEngine) -> str:
    plan, grid = engine.plan, engine.grid
    ffn = plan.feed_forward[0]
    experts = f"{ffn.experts} experts top-{ffn.topk}" if ffn.experts else "dense"
    where = torch.cuda.get_device_name() if engine.device.type == "cuda" else "CPU runtime (no CUDA device), gloo"
    return (
        f"{plan.n_layers} layers × {plan.d_model}, {experts}, "
        f"{plan.active_parameters / 1e6:.1f}M active weights a token; "
        f"dp{engine.data_size} tp{grid.tp} cp{grid.cp} pp{grid.pp} ep{grid.ep}; {where}"
    )


def _beginning(start: StartWeights, new: list[str]) -> str:
    parts = sorted({name.rpartition("layers.")[2].lstrip("0123456789.") for name in new})
    fresh = f"; {len(new)} tensors are not in it and start as initialised ({', '.join(parts)})" if new else ""
    return f"first weights from {start}{fresh}"


def _require_all_read(cfg: RunConfig, folder: RunFolder) -> None:
    """Refuse keys that the user set and that neither the launcher nor any rank has read, before the first step."""
    read: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(read, cfg.read_keys())
    launcher = set(json.loads(folder.data.read_text())["read_keys"])
    cfg.require_all_read(set.union(*read, launcher, READ_AFTER_TRAINING))


def main(path: Path, stop: StopRequest) -> int:
    """Run, and turn a user's mistake into one sentence and an exit code."""
    try:
        return run(path, stop)
    except RefractorError as error:
        rank = int(os.environ.get("RANK", "0"))
        print(f"[rank {rank}] error: {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), _STOP))
