"""Megatron -> HF -> Megatron bit for bit, for every kind of model, with logits compared on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from refractor_megatron.checkpoint.convert.hf_folder import PADDING, HfFolder
from refractor_megatron.checkpoint.convert.megatron_folder import find_step
from refractor_megatron.checkpoint.convert.to_hf import ExportOptions, export
from refractor_megatron.checkpoint.convert.to_megatron import ImportOptions, import_folder
from refractor_megatron.checkpoint.convert.verify import verify_folder
from refractor_megatron.checkpoint.store import Store
from refractor_megatron.config import RunConfig
from refractor_megatron.training.state import TrainState
from tests.convert.runs import VARIANTS, bank_of, make_run
from tests.engine import engine_of

pytestmark = pytest.mark.slow
SMALL = 300_000  # bytes of a shard: several files even here


def silent(text: str) -> None:
    """No output."""


def state_of(run: Path) -> tuple[RunConfig, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Raw weights and averages as Megatron loads them into an engine."""
    cfg = RunConfig.load(run / "config.yaml")
    engine = engine_of(cfg, bank=bank_of(cfg))
    state = TrainState(cfg, engine, "digest", "index" if bank_of(cfg) else None)
    step = find_step(run)
    state.check_identity(step)
    state.load(Store(run / "checkpoints", 2), step, optimizer=False)
    assert state.ema is not None and state.progress.step == 7
    raw = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    return cfg, raw, {name: average.clone() for name, average in state.ema.average.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(tmp_path: Path, variant: str) -> None:
    run, served, back, again = (tmp_path / name for name in ("run", "served", "back", "again"))
    make_run(run, *VARIANTS[variant])
    weights = "ema" if variant in ("gated", "padded", "two levels") else "raw"
    ledger = export(run, served, ExportOptions(weights=weights, shard_size=SMALL), silent)
    assert len(list(served.glob("model-*.safetensors"))) > 1
    assert (served / PADDING).exists() == (variant in ("tied", "padded"))
    assert set(ledger.left.values()) == {"no content", "optimizer state", "weights not asked for"}
    verify_folder(served, silent)
    import_folder(served, back, ImportOptions(shard_size=SMALL, logits=variant == "gated"), silent)
    cfg, raw, average = state_of(run)
    new_cfg, new_raw, new_average = state_of(back)
    assert new_cfg.hash == cfg.hash
    expected = average if weights == "ema" else raw
    same(expected, new_raw)
    same(expected, new_average)
    export(back, again, ExportOptions(shard_size=SMALL, logits=False), silent)
    files = [p.name for p in served.glob("*.safetensors") if p.name != "refractor_probe.safetensors"]
    for name in [*files, "config.json", "tokenizer.json", "refractor_run.yaml", "model.safetensors.index.json"]:
        assert (served / name).read_bytes() == (again / name).read_bytes(), name


def test_bf16_keeps_its_bits_and_rounding_is_what_was_asked_for(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "train.mixed_precision=bf16")
    export(tmp_path / "run", tmp_path / "raw", ExportOptions(), silent)
    assert {t.dtype for t in HfFolder(tmp_path / "raw").tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "raw/config.json").read_text())["dtype"] == "bfloat16"
    import_folder(tmp_path / "raw", tmp_path / "back", ImportOptions(), silent)
    same(state_of(tmp_path / "run")[1], state_of(tmp_path / "back")[1])
    export(tmp_path / "run", tmp_path / "exact", ExportOptions("ema", dtype=None, logits=False), silent)
    export(tmp_path / "run", tmp_path / "rounded", ExportOptions("ema", dtype=torch.bfloat16), silent)
    exact, rounded = HfFolder(tmp_path / "exact"), HfFolder(tmp_path / "rounded")
    for name in exact.tensors:
        assert exact.read(name).dtype == torch.float32
        assert torch.equal(exact.read(name).bfloat16(), rounded.read(name)), name


def test_padding_rows_never_reach_the_model(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "model.vocab_size=515")
    export(tmp_path / "run", tmp_path / "served", ExportOptions(logits=False), silent)
    padding = safetensors.torch.load_file(tmp_path / "served" / PADDING)
    assert {name: tuple(t.shape) for name, t in padding.items()} == {
        "model.embed_tokens.padding": (125, 64),
        "lm_head.padding": (125, 64),
    }
    (tmp_path / "served" / PADDING).unlink()
    for name in ("refractor_manifest.json", "refractor_run.yaml"):
        (tmp_path / "served" / name).unlink()
    ledger = import_folder(tmp_path / "served", tmp_path / "back", ImportOptions(logits=False), silent)
    text = ledger.text()
    assert "lm_head.padding: no such rows" in text and "written as zeros" in text
    assert "nobody can tell whether tensors were exchanged" in text
    rows = state_of_output(tmp_path / "back")
    assert rows.shape[0] == 640 and rows[:515].any(1).all() and not rows[515:].any()


def state_of_output(run: Path) -> torch.Tensor:
    return state_of_unchecked(run)["output_layer.weight"]


def state_of_unchecked(run: Path) -> dict[str, torch.Tensor]:
    cfg = RunConfig.load(run / "config.yaml")
    engine = engine_of(cfg)
    state = TrainState(cfg, engine, "")
    state.load(Store(run / "checkpoints", 2), find_step(run), optimizer=False)
    return dict(engine.model.named_parameters())


def test_transformers_alone_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder's own code, offline, by the Auto classes."""
    import transformers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    make_run(tmp_path / "run", *VARIANTS["tied"])
    export(tmp_path / "run", tmp_path / "served", ExportOptions(shard_size=SMALL), silent)
    served = tmp_path / "served"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        served, trust_remote_code=True, local_files_only=True, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__module__.startswith("transformers_modules")
    tokenizer = transformers.AutoTokenizer.from_pretrained(served, local_files_only=True)
    assert len(tokenizer) == model.config.vocab_size == 515
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, model.config.end_token_id]
    found = {n: t for path in served.glob("model-*.safetensors") for n, t in safetensors.torch.load_file(path).items()}
    state = model.state_dict()
    assert state.keys() - found.keys() == {"lm_head.weight"} and not found.keys() - state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in found.items())
