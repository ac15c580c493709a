"""``refractor pretrain --weights``: another run's weights at step 0, on any grid, once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from refractor_megatron.checkpoint.store import Store
from refractor_megatron.cli import main
from refractor_megatron.config import RunConfig
from refractor_megatron.errors import CheckpointError
from refractor_megatron.telemetry.sinks.jsonl import read_jsonl
from refractor_megatron.training.folder import RunFolder
from refractor_megatron.training.spawn import spawn
from refractor_megatron.training.start import fitting, load_first_weights
from refractor_megatron.training.state import TrainState
from refractor_megatron.training.weights import StartWeights
from tests.corpus import write_corpus
from tests.engine import engine_of, tiny
from tests.runs import pretrain
from tests.warm import warm_ranks

pytestmark = [pytest.mark.slow, pytest.mark.gloo]
#: Every expert is chosen: top-k of fewer jumps where two scores tie.
SHORT = ["train.schedule.warmup_steps=1", "train.schedule.cosine.steps=4", "evaluation.every=9", "model.ffn.topk=4"]


def prepare(root: Path, name: str, *more: str) -> Path:
    """A run folder ready for its ranks; flags before overrides."""
    assert main(pretrain(root, root / name, "--prepare-only", *more, *SHORT)) == 0
    return root / name


def train(run: Path, ranks: int = 1) -> list[float]:
    """Losses of the whole run."""
    with warm_ranks():
        assert spawn("refractor_megatron.training.worker", [str(run)], ranks) == 0
    return [record["loss"] for record in read_jsonl(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a run of three steps in ``source``."""
    root = tmp_path_factory.mktemp("weights")
    write_corpus(root / "text")
    train(prepare(root, "source", "train.steps=3", "checkpoint.every=3", "train.ema.decay=0.2"))
    return root


@pytest.fixture(scope="module")
def started(root: Path) -> list[float]:
    """Losses of four steps from the source's weights on one rank, in ``one``."""
    return train(prepare(root, "one", "--weights", str(root / "source"), "train.steps=4", "checkpoint.every=2"))


@pytest.mark.parametrize("grid", ["tp", "pp", "ep"])
def test_two_ranks_start_where_one_does(root: Path, started: list[float], grid: str) -> None:
    flags = ["--weights", str(root / "source" / "checkpoints" / "step_00000003"), "--ranks", "2"]
    losses = train(prepare(root, f"{grid}2", *flags, f"parallel.{grid}=2", "train.steps=4"), 2)
    assert losses == pytest.approx(started, abs=1e-5)


def test_they_are_not_random_weights(root: Path, started: list[float]) -> None:
    random = train(prepare(root, "random", "train.steps=1"))
    assert abs(random[0] - started[0]) > 1e-2


def test_resume_does_not_ask_the_source_again(root: Path, started: list[float]) -> None:
    """Stopped after two steps, the source gone: the same command goes on as if nothing had happened."""
    source = root / "gone"
    shutil.copytree(root / "source", source)
    command = ["--weights", str(source)]
    run = prepare(root, "stopped", *command, "train.steps=2", "checkpoint.every=2")
    train(run)
    shutil.rmtree(source)
    prepare(root, "stopped", *command, "train.steps=4", "checkpoint.every=2")
    assert train(run) == started
    record = json.loads((run / "weights.json").read_text())
    assert record["source"] == str(source) and record["step"] == 3
    assert record["checkpoint"] in json.loads((run / "environment.json").read_text())["first_weights"]


def test_refusals_of_a_run_that_has_trained(
    root: Path, started: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Other weights may not be slipped under it; nor weights under a run that began at random."""
    for name, weights in (("one", "tp2-elsewhere"), ("source", "one")):
        steps = "train.steps=4" if name == "one" else "train.steps=3"
        more = [steps, *(["train.ema.decay=0.2"] if name == "source" else []), *SHORT]
        arguments = pretrain(root, root / name, "--prepare-only", "--weights", str(root / weights), *more)
        assert main(arguments) == 6
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: ") and "--out" in message and str(root / weights) in message


def state_from_source(root: Path, *overrides: str) -> tuple[TrainState, list[str]]:
    """A fresh state in this process that starts from the source's weights, and the names of what it lacks."""
    cfg = tiny(*SHORT, *overrides)
    state = TrainState(cfg, engine_of(cfg), "unused")
    store = Store(root / "nowhere", 1)
    start = StartWeights.read(RunFolder(root / "one"))
    assert start is not None
    return state, state.start_from(cfg, store, start)


def test_weights_are_raw_average_starts_equal_and_nothing_else_comes_along(root: Path, started: list[float]) -> None:
    state, new = state_from_source(root)
    assert new == [] and state.progress.step == 0 and state.ema is not None
    found = {name: p.detach().clone() for name, p in state.engine.model.named_parameters()}
    assert all(torch.equal(found[name], average) for name, average in state.ema.average.items())
    moments = [inner.optimizer.state_dict()["state"] for inner in _optimizers(state)]
    assert not any(moments), "the optimizer starts afresh"

    cfg = RunConfig.load(root / "source" / "config.yaml")
    digest = json.loads((root / "source" / "data.json").read_text())["digest"]
    source = TrainState(cfg, engine_of(cfg), digest)
    store = Store(root / "source" / "checkpoints", 2)
    folder = store.latest()
    assert folder is not None and source.ema is not None
    source.load(store, folder)
    for name, parameter in source.engine.model.named_parameters():
        assert torch.equal(found[name], parameter), name
    assert any(not torch.equal(found[name], average) for name, average in source.ema.average.items())


def _optimizers(state: TrainState) -> list:
    return getattr(state.engine.optimizer, "chained_optimizers", [state.engine.optimizer])


def test_bf16_weights_from_fp32_ones(root: Path, started: list[float]) -> None:
    """Rounded once; the optimizer's fp32 copies and the average start from the rounded weights."""
    exact, _ = state_from_source(root)
    known = {name: p.detach().clone() for name, p in exact.engine.model.named_parameters()}
    state, new = state_from_source(root, "train.mixed_precision=bf16")
    assert new == [] and state.ema is not None
    for name, parameter in state.engine.model.named_parameters():
        rounded = known[name].to(torch.bfloat16)
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, rounded), name
        assert torch.equal(state.ema.average[name], rounded.float())
        assert torch.equal(parameter.main_param.reshape(rounded.shape), rounded.float())


def test_parts_that_refractor_adds_may_be_new(root: Path, started: list[float]) -> None:
    """Gates that the source lacks stay as initialised; that is how a plain decoder gets tiers."""
    before = {
        n: p.detach().clone() for n, p in engine_of(tiny(*SHORT, "relation.combine=gated")).model.named_parameters()
    }
    state, new = state_from_source(root, "relation.combine=gated", "router.gate_features=true")
    parts = {name.rpartition(".")[2] for name in new}
    assert parts == {"tier_gate_bias", "tier_gate_weight", "feature_weight"} and len(new) == 2 * 3
    for name, parameter in state.engine.model.named_parameters():
        if name in before and name.rpartition(".")[2] in parts:
            assert torch.equal(before[name], parameter), name


@pytest.mark.parametrize(
    ("override", "tensor", "key"),
    [
        ("model.ffn.hidden=256", "linear_fc1.weight is [4, 256, 64] there and [4, 512, 64]", "model.ffn.hidden=128"),
        ("model.n_layers=3", "decoder.layers.2.", "model.n_layers=2 (now 3)"),
        ("model.n_layers=1", "decoder.layers.1.", "model.n_layers=2 (now 1)"),
        ("model.role_embeddings=false", "tokentype_embeddings.weight is there", "model.role_embeddings=true"),
        ("relation.global.summaries_per_block=1", "summary_query is [2, 2, 16] there", "summaries_per_block=2 (now 1)"),
        ("relation.global.summaries_per_block=0", "summary_query is there", "summaries_per_block=2 (now 0)"),
        ("model.ffn.type=dense", "mlp.linear_fc1.weight is missing", "model.ffn.type=moe"),
        ("model.tie_embeddings=true", "output_layer.weight is there", "model.tie_embeddings=false"),
        ("model.vocab_size=1025", "word_embeddings.weight is [1024, 64] there", "model.vocab_size=1024"),
        ("model.n_kv_heads=4", "summary_query is [2, 2, 16] there and [4, 2, 16] here", "model.n_kv_heads=2"),
        ("model.n_heads=8", "summary_query is [2, 2, 16] there and [2, 2, 8] here", "model.n_heads=4"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_tensor_and_key(
    root: Path, started: list[float], override: str, tensor: str, key: str
) -> None:
    extra = ["model.ffn.topk=2"] if override == "model.ffn.type=dense" else []
    with pytest.raises(CheckpointError) as refusal:
        state_from_source(root, override, *extra)
    message = str(refusal.value)
    assert tensor in message and key in message and "\n" not in message


def test_heads_may_not_change_where_no_shape_tells(tmp_path: Path) -> None:
    """As many key/value heads as heads: eight heads of 8 have the shapes of four heads of 16."""
    four, eight = (tiny(f"model.n_heads={n}", f"model.n_kv_heads={n}") for n in (4, 8))
    shapes = {"decoder.layers.0.self_attention.linear_qkv.weight": (192, 64)}
    assert fitting(shapes, shapes, four, four, tmp_path) == []
    with pytest.raises(CheckpointError, match=r"linear_qkv.weight .* set model.n_heads=4 \(now 8\)"):
        fitting(shapes, shapes, four, eight, tmp_path)


def test_a_damaged_source_is_refused(root: Path, started: list[float], tmp_path: Path) -> None:
    shutil.copytree(root / "source", tmp_path / "source")
    folder = tmp_path / "source" / "checkpoints" / "step_00000003"
    victim = next(folder.glob("*.distcp"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    start = StartWeights(str(tmp_path), str(folder), 3, "", "", None)
    cfg = tiny(*SHORT)
    with pytest.raises(CheckpointError, match=f"{victim.name} does not match its sha256"):
        load_first_weights(cfg, engine_of(cfg), Store(tmp_path / "own", 1), start)
