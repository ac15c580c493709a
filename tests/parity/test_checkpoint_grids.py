"""A checkpoint of any grid is the checkpoint of one rank (weights, moments, EMA), and any grid goes on from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from refractor_megatron.checkpoint.store import Store
from refractor_megatron.cli import main
from refractor_megatron.config import RunConfig, compose
from refractor_megatron.training.spawn import spawn
from refractor_megatron.training.state import TrainState
from tests.corpus import write_corpus
from tests.engine import engine_of

pytestmark = [pytest.mark.slow, pytest.mark.gloo, pytest.mark.timeout(900)]
GRIDS = {"dp2": [], **{f"{name}2": [f"parallel.{name}=2"] for name in ("tp", "pp", "ep", "cp")}}


def prepare(root: Path, name: str, *overrides: str) -> Path:
    out = root / name
    arguments = ["pretrain", "--preset", "nano", "--corpus", str(root / "text"), "--data-root", str(root / "data")]
    arguments += ["--out", str(out), "--prepare-only", "--ranks", "1" if name == "one" else "2"]
    arguments += ["train.steps=4", "train.schedule.warmup_steps=2", "checkpoint.every=4", "evaluation.every=4"]
    assert main([*arguments, "telemetry.wandb=false", "telemetry.tensorboard=false", *overrides]) == 0
    return out


def worker(run: Path, ranks: int) -> None:
    assert spawn("refractor_megatron.training.worker", [str(run)], ranks) == 0


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint, loaded on one rank."""
    cfg = RunConfig.load(run / "config.yaml")
    engine = engine_of(compose(["experiment=nano"]))
    state = TrainState(cfg, engine, json.loads((run / "data.json").read_text())["digest"])
    store = Store(run / "checkpoints", 2)
    folder = store.latest()
    assert folder is not None
    experts_apart = json.loads((folder / "manifest.json").read_text())["grid"]["ep"] > 1
    state.load(store, folder, optimizer=not experts_apart)
    assert state.ema is not None
    found = {f"model.{n}": p.detach().clone() for n, p in engine.model.named_parameters()}
    found |= {f"ema.{n}": t.clone() for n, t in state.ema.average.items()}
    if experts_apart:  # moments cannot be loaded across EP = 1 and EP > 1 (upstream); weights and EMA can
        return found
    for inner in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        for number, moments in inner.optimizer.state_dict()["state"].items():
            found |= {f"adam.{number}.{k}": v.clone() for k, v in moments.items() if k.startswith("exp_avg")}
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("grids")
    write_corpus(root / "text")
    worker(prepare(root, "one"), 1)
    return root


@pytest.mark.parametrize("grid", GRIDS)
def test_checkpoint_of_a_grid_equals_one_rank(root: Path, grid: str) -> None:
    run = prepare(root, grid, *GRIDS[grid])
    worker(run, 2)
    expected, found = state_of(root / "one"), state_of(run)
    assert expected.keys() == found.keys() or (grid == "ep2" and not any(name.startswith("adam") for name in found))
    for name in found:
        value = expected[name]
        bound = 2e-4 * value.norm().clamp_min(1e-6)
        assert (found[name] - value).norm() <= bound, name
    evaluations = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    reference = [json.loads(line) for line in (root / "one" / "eval.jsonl").read_text().splitlines()]
    for a, b in zip(evaluations, reference, strict=True):
        assert (a["step"], a["weights"]) == (b["step"], b["weights"]) and abs(a["loss"] - b["loss"]) <= 1e-5


def test_optimizer_state_between_ep_1_and_ep_2_is_refused(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = root / "one-ep2"
    shutil.copytree(root / "one", run)
    arguments = ["pretrain", "--preset", "nano", "--corpus", str(root / "text"), "--data-root", str(root / "data")]
    arguments += ["--out", str(run), "--ranks", "2", "train.schedule.warmup_steps=2", "train.steps=6"]
    arguments += ["train.schedule.cosine.steps=4", "telemetry.wandb=false", "telemetry.tensorboard=false"]
    assert main([*arguments, "parallel.ep=2"]) == 4
    message = capfd.readouterr().err
    assert "resume with parallel.ep=1" in message and "Traceback" not in message


STEPS = [("one", "tp2"), ("tp2", "pp2"), ("pp2", "one"), ("one", "dp2"), ("one", "cp2"), ("cp2", "one")]


@pytest.mark.parametrize(("before", "after"), STEPS)
def test_another_grid_goes_on_where_one_stopped(root: Path, before: str, after: str) -> None:
    """Steps 5-6 on another grid follow steps 5-6 on the same one within 1e-5."""

    def continued(name: str, grid: str) -> list[float]:
        run = root / name
        shutil.copytree(root / before, run)
        extra = ["train.steps=6", "train.schedule.cosine.steps=4", *GRIDS.get(grid, [])]
        ranks = 1 if grid == "one" else 2
        arguments = ["pretrain", "--preset", "nano", "--corpus", str(root / "text"), "--data-root", str(root / "data")]
        arguments += ["--out", str(run), "--prepare-only", "--ranks", str(ranks), "train.schedule.warmup_steps=2"]
        arguments += ["telemetry.wandb=false", "telemetry.tensorboard=false", "evaluation.every=4", *extra]
        assert main(arguments) == 0
        worker(run, ranks)
        records = {r["step"]: r["loss"] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
        return [records[5], records[6]]

    if not (root / before).exists():
        worker(prepare(root, before, *GRIDS[before]), 2)
    same, other = continued(f"{before}-{after}-same", before), continued(f"{before}-{after}", after)
    assert same == pytest.approx(other, abs=1e-5)
