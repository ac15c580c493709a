"""Foreign models that cannot be taken, and ours that cannot be given: one sentence, nothing published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from refractor_megatron.cli import main
from tests.convert.foreign import save
from tests.convert.runs import make_run

FULL = ["relation.local.window=128", "relation.global.summaries_per_block=0", "safety=open"]


def refused(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str) -> str:
    """The sentence with which ``convert`` refuses; nothing is left behind."""
    before = sorted(out.parent.iterdir())
    assert main(["convert", *arguments, "--out", str(out)]) != 0
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and "Traceback" not in message
    assert sorted(out.parent.iterdir()) == before, "no half of a folder"
    return message


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another family": (
        "llama", {"model_type": "gpt2"}, "model_type 'gpt2' cannot be imported; the supported ones are llama",
    ),
    "attention bias": ("llama", {"attention_bias": True}, "attention_bias is true"),
    "feed-forward bias": ("llama", {"mlp_bias": True}, "mlp_bias is true"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "wide heads": ("llama", {"head_dim": 16}, "head_dim 16 times 4 heads is not hidden_size 32"),
    "llama3 rope": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}},
        "rope_type 'llama3'",
    ),
    "old llama3 rope": (
        "llama", {"rope_parameters": None, "rope_scaling": {"rope_type": "llama3"}}, "rope_type 'llama3'",
    ),
    "dynamic rope": ("llama", {"rope_parameters": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    "rope without factor": ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is None"),
    "yarn temperature": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}},
        "attention_factor is 1.0",
    ),
    "yarn mscale": (
        "llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}}, "rope_parameters.mscale",
    ),
    "yarn without rounding": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
        "rope_parameters.truncate",
    ),
    "part of a head rotates": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "unlike layers": (
        "mistral", {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}, "full_attention",
    ),
    "no layers": ("llama", {"num_hidden_layers": None}, "num_hidden_layers is missing"),
    "width is no number": ("llama", {"hidden_size": "32"}, "hidden_size is '32'"),
    "heads do not divide": ("mixtral", {"num_attention_heads": 5, "head_dim": None}, "n_heads"),
    "tiny vocabulary": ("llama", {"vocab_size": 300}, "vocab_size 300 is below"),
    "more layers than weights": ("llama", {"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
    "fewer layers": ("llama", {"num_hidden_layers": 1}, "tensor model.layers.1."),
    "another width": ("llama", {"intermediate_size": 64}, "model.layers.0.mlp.gate_proj.weight"),
    "fewer experts": ("mixtral", {"num_local_experts": 3}, "block_sparse_moe.gate.weight"),
    "more experts": ("mixtral", {"num_local_experts": 5}, "block_sparse_moe.gate.weight"),
    "tied by word only": ("llama", {"tie_word_embeddings": True}, "lm_head.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, to: str) -> None:
    family, changes, needle = CONFIGS[name]
    source = save(tmp_path / "source", family)
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert needle in refused(capsys, tmp_path / "out", str(source), "--to", to)


def edited(source: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"format": "pt"})


def drop_expert(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]


def add_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)


def transpose(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    tensors[name] = tensors[name].T


def zero(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.k_proj.weight"].zero_()


def both_names(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.0.block_sparse_moe.gate.weight"].clone()


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = torch.nan


def double(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()


WEIGHTS: dict[Callable[[dict[str, torch.Tensor]], None], str] = {
    drop_expert: "tensor model.layers.1.block_sparse_moe.experts.2.w3.weight is missing",
    add_bias: "tensor model.layers.0.self_attn.q_proj.bias",
    transpose: "tensor model.layers.0.block_sparse_moe.experts.1.w2.weight",
    zero: "tensor model.layers.1.self_attn.k_proj.weight",
    both_names: "are the same weight",
    not_a_number: "tensor model.norm.weight",
    double: "dtype F64",
}


@pytest.mark.parametrize("change", WEIGHTS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, torch.Tensor]], None], to: str
) -> None:
    source = save(tmp_path / "source", "mixtral")
    edited(source, change)
    assert WEIGHTS[change] in refused(capsys, tmp_path / "out", str(source), "--to", to)


def test_tensors_swapped_after_the_import_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing in a foreign folder could tell, but an imported one has hashes."""
    source = save(tmp_path / "source", "llama")
    assert main(["convert", str(source), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    path = next((tmp_path / "hf").glob("model-*.safetensors"))
    tensors = load_file(path)
    one, two = (f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))
    tensors[one], tensors[two] = tensors[two], tensors[one]
    save_file(tensors, path, {"format": "pt"})
    message = refused(capsys, tmp_path / "back", str(tmp_path / "hf"), "--to", "llama")
    assert "q_proj.weight" in message


def test_pickles_and_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "source", "llama")
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "truncated" in refused(capsys, tmp_path / "out", str(source), "--to", "hf")
    weights.unlink()
    torch.save({"model.norm.weight": torch.ones(32)}, source / "pytorch_model.bin")
    assert "is a pickle" in refused(capsys, tmp_path / "out", str(source), "--to", "megatron")


def test_a_model_that_computes_something_else_is_not_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison of logits is what stands between a misread configuration and a wrong model."""
    from refractor_megatron.checkpoint.convert import foreign_config

    source = save(tmp_path / "source", "llama")
    right = foreign_config._rope

    def wrong(get: Any, length: int) -> tuple[dict[str, Any], int]:
        keys, length = right(get, length)
        return keys | {"model.rope.theta": 2e4}, length

    monkeypatch.setattr(foreign_config, "_rope", wrong)
    for to in ("hf", "megatron"):
        assert "differ by" in refused(capsys, tmp_path / "out", str(source), "--to", to)


EXPORTS: dict[str, tuple[list[str], str, tuple[str, ...]]] = {
    "summaries and window": (["safety=open", "model.role_embeddings=false"], "mixtral", ("summaries", "--drop-tiers")),
    "rules": ([*FULL[:2], "model.role_embeddings=false"], "mixtral", ("mask rules safety_restricted", "--drop-tiers")),
    "roles": (FULL, "mixtral", ("model.role_embeddings.weight", "--drop-tiers")),
    "router features": (
        [*FULL, "model.role_embeddings=false", "router.gate_features=true"],
        "mixtral",
        ("mlp.gate.feature_weight", "--drop-tiers"),
    ),
    "experts to llama": (FULL, "llama", ("4 experts",)),
    "dense to mixtral": ([*FULL, "model.ffn.type=dense"], "mixtral", ("no experts",)),
    "gelu": ([*FULL, "model.ffn.type=dense", "model.ffn.activation=gelu"], "llama", ("gelu",)),
    "half a head rotates": ([*FULL, "model.ffn.type=dense", "model.rope.dim=32"], "llama", ("8 of the 16",)),
    "raw probabilities": ([*FULL, "router.renormalize_topk=false"], "mixtral", ("router.renormalize_topk",)),
    "gate temperature": ([*FULL, "router.gate_temp=2.0"], "mixtral", ("temperature 2.0",)),
    "linear attention": (["relation.linear_mode.L_switch=64", "safety=open"], "mixtral", ("linear attention",)),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTS)
def test_what_others_cannot_express(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    overrides, family, needles = EXPORTS[name]
    make_run(tmp_path / "run", *overrides)
    message = refused(capsys, tmp_path / "out", str(tmp_path / "run"), "--to", family)
    assert all(needle in message for needle in needles), message


def test_flags_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "source", "llama")
    out = tmp_path / "out"
    assert "--drop-tiers" in refused(capsys, out, str(source), "--to", "hf", "--drop-tiers")
    assert "--weights" in refused(capsys, out, str(source), "--to", "hf", "--weights", "raw")
    assert "--dtype" in refused(capsys, out, str(source), "--to", "megatron", "--dtype", "bf16")
    assert "nothing" in refused(capsys, out, str(tmp_path / "nothing"), "--to", "llama")
