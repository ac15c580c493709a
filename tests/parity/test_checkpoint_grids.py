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
from refractor_megatron.telemetry.sinks.jsonl import read_jsonl
from refractor_megatron.training.spawn import spawn
from refractor_megatron.training.state import TrainState
from tests.corpus import write_corpus
from tests.engine import engine_of
from tests.runs import pretrain
from tests.warm import warm_ranks

pytestmark = [pytest.mark.slow, pytest.mark.gloo, pytest.mark.timeout(900)]
#: Every expert is chosen: top-k of fewer jumps where two scores tie, and ties fall as each processor rounds.
SMOOTH = ["model.ffn.topk=4"]
GRIDS = {"dp2": [], **{f"{name}2": [f"parallel.{name}=2"] for name in ("tp", "pp", "ep", "cp")}}


def prepare(root: Path, name: str, *overrides: str) -> Path:
    flags = ["--prepare-only", "--ranks", "1" if name == "one" else "2"]
    settings = ["train.steps=4", "train.schedule.warmup_steps=2", "checkpoint.every=4", "evaluation.every=4", *SMOOTH]
    assert main(pretrain(root, root / name, *flags, *settings, *overrides)) == 0
    return root / name


def worker(run: Path, ranks: int) -> None:
    with warm_ranks():
        assert spawn("refractor_megatron.training.worker", [str(run)], ranks) == 0


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint, loaded on one rank."""
    cfg = RunConfig.load(run / "config.yaml")
    engine = engine_of(compose(["experiment=nano", *SMOOTH]))
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
    evaluations, reference = (read_jsonl(r / "eval.jsonl", ("step", "weights")) for r in (run, root / "one"))
    assert {(r["step"], r["weights"]) for r in reference} == {(4, "raw"), (4, "ema")}
    for a, b in zip(evaluations, reference, strict=True):
        assert (a["step"], a["weights"]) == (b["step"], b["weights"]) and abs(a["loss"] - b["loss"]) <= 1e-5


#: Overrides that let a run of four steps go on to six with the same learning rates.
LONGER = [*SMOOTH, "train.schedule.warmup_steps=2", "train.steps=6", "train.schedule.cosine.steps=4"]


def test_optimizer_state_between_ep_1_and_ep_2_is_refused(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = root / "one-ep2"
    shutil.copytree(root / "one", run)
    assert main(pretrain(root, run, "--ranks", "2", *LONGER, "parallel.ep=2")) == 4
    message = capfd.readouterr().err
    assert "resume with parallel.ep=1" in message and "Traceback" not in message


STEPS = [("one", "tp2"), ("tp2", "pp2"), ("pp2", "one"), ("one", "dp2"), ("one", "cp2"), ("cp2", "one")]


@pytest.mark.parametrize(("before", "after"), STEPS)
def test_another_grid_goes_on_where_one_stopped(root: Path, before: str, after: str) -> None:
    """Steps 5-6 on another grid follow steps 5-6 on the same one within 1e-5."""
    if not finished(root / before, 4):
        worker(prepare(root, before, *GRIDS[before]), 2)
    assert continued(root, before, before) == pytest.approx(continued(root, before, after), abs=1e-5)


def continued(root: Path, before: str, grid: str) -> list[float]:
    """Losses of steps 5 and 6 of a run that ``before`` began, on ``grid``; trained once."""
    run = root / f"{before}-{grid}"
    if not finished(run, 6):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(root / before, run)
        ranks = 1 if grid == "one" else 2
        flags = ["--prepare-only", "--ranks", str(ranks)]
        assert main(pretrain(root, run, *flags, "evaluation.every=4", *LONGER, *GRIDS.get(grid, []))) == 0
        worker(run, ranks)
    return [record["loss"] for record in read_jsonl(run / "metrics.jsonl")[4:6]]


def finished(run: Path, step: int) -> bool:
    return step in {record["step"] for record in read_jsonl(run / "metrics.jsonl")}
