"""One rank of a run: ``python -m refractor_megatron.training.worker RUN_FOLDER`` (alone, or under torchrun or srun).

Everything it needs is in the run folder: the resolved configuration and the dataset's place.
"""

from __future__ import annotations

import sys

from ..resilience.signals import EXIT_STOPPED, StopRequest

_STOP = StopRequest().install() if __name__ == "__main__" else StopRequest()  # before torch: a signal may come early

import json  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from data_pipeline.stream import SampleStream  # noqa: E402

from ..checkpoint.store import Store  # noqa: E402
from ..config import RunConfig  # noqa: E402
from ..distinction.roles import DOCUMENT_ROLE, ROLE_ID  # noqa: E402
from ..engines.megatron import MegatronEngine, start_distributed, stop_distributed  # noqa: E402
from ..errors import DataError, RefractorError  # noqa: E402
from ..fabric.plan import plan_for  # noqa: E402
from ..telemetry import flops  # noqa: E402
from ..telemetry.console import Console  # noqa: E402
from ..telemetry.hub import Telemetry  # noqa: E402
from .callbacks import Checkpointing, Evaluating, Reporting  # noqa: E402
from .folder import RunFolder, write_json  # noqa: E402
from .loop import Callback, Recipe, train  # noqa: E402
from .schedule import schedule_of  # noqa: E402
from .state import TrainState  # noqa: E402

#: Keys whose reader comes after the last step (``evaluation.final``).
READ_AFTER_TRAINING = {"evaluation.samples", "evaluation.sample_tokens"}


def run(path: Path, stop: StopRequest) -> int:
    """Train the run in ``path`` to its end or to a signal; returns the exit code."""
    folder = RunFolder(path)
    cfg = RunConfig.load(folder.config)
    device = start_distributed()
    try:
        engine = MegatronEngine(cfg, device)
        stream = open_stream(folder, cfg, "train")
        state = TrainState(cfg, engine, stream.digest)
        store = Store(folder.checkpoints, cfg.checkpoint.keep)
        resumed = state.resume(store)
        console, callbacks = _callbacks(folder, cfg, state, store)
        say = console.message if console is not None else _silent
        say(f"resumed after step {state.progress.step}" if resumed else _headline(engine))
        recipe = Recipe(
            cfg.train.steps,
            cfg.train.global_batch,
            cfg.train.micro_batch,
            cfg.train.optimizer.wd,
            schedule_of(cfg),
        )
        _require_all_read(cfg, folder)
        try:
            done = train(state, stream, recipe, callbacks, stop, say)
        finally:
            for callback in callbacks:
                if isinstance(callback, Reporting):
                    callback.console.close()
                    callback.telemetry.close()
        return 0 if done else EXIT_STOPPED
    finally:
        stop_distributed()


def open_stream(folder: RunFolder, cfg: RunConfig, split: str) -> SampleStream:
    """The run's dataset, checked against the digest it was prepared for."""
    data = json.loads(folder.data.read_text())
    stream = SampleStream(Path(data["folder"]), cfg.train.seq_len, cfg.train.seed, split)
    if stream.digest != data["digest"]:
        raise DataError(
            f"{data['folder']} has digest {stream.digest}, the run was prepared for {data['digest']}: "
            "restore that dataset or start another run with --out."
        )
    return stream


def _callbacks(
    folder: RunFolder, cfg: RunConfig, state: TrainState, store: Store
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
            open_stream(folder, cfg, "heldout"),
            telemetry,
            every=evaluation.every,
            batches=evaluation.batches,
            micro_batch=cfg.train.micro_batch,
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
        f"dp{engine.data_size} tp{grid.tp} pp{grid.pp} ep{grid.ep}; {where}"
    )


def flops_per_token(engine: MegatronEngine) -> float:
    """Training FLOPs of a token of a plain document, counting only the pairs that the mask leaves."""
    plan, length = engine.plan, engine.seq_len
    records = torch.zeros(1, length, 4, dtype=torch.int32)
    records[..., 2] = ROLE_ID[DOCUMENT_ROLE]
    pairs = sum(
        plan_for(records, engine.rules, a.window, a.block_size, a.summaries_per_block).stats.legal_edges
        for a in plan.attention
    )
    head = plan.attention[0]
    return flops.train_flops_per_token(plan.active_parameters, pairs / length, head.heads, head.head_dim)


def peak_of(engine: MegatronEngine) -> flops.Peak:
    """Peak of this rank's device: from the data sheet, else measured with a matrix product."""
    dtype = torch.bfloat16 if engine.config.bf16 else torch.float32
    name = "bf16" if engine.config.bf16 else "fp32"
    if engine.device.type == "cuda":
        tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        known = flops.known_peak(torch.cuda.get_device_name(), "tf32" if tf32 else name)
        if known is not None:
            return known
    n = 1024 if engine.device.type == "cpu" else 8192
    a = torch.ones(n, n, dtype=dtype, device=engine.device)

    def product() -> None:
        a @ a
        torch.cuda.synchronize()

    where = f"{torch.get_num_threads()} threads" if engine.device.type == "cpu" else torch.cuda.get_device_name()
    return flops.measure_peak(product, 2.0 * n**3, f"{name} GEMM, {where}")


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
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), _STOP))
