"""What of our own models other decoders can express: all of it, or its dense part by request."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from refractor_megatron.checkpoint.convert.foreign import foreign_name, our_name
from refractor_megatron.checkpoint.convert.mapping import table
from refractor_megatron.checkpoint.convert.megatron_folder import MegatronFolder, find_step
from refractor_megatron.checkpoint.convert.shape import Shape
from refractor_megatron.cli import main
from refractor_megatron.config import RunConfig
from refractor_megatron.hf.modeling_refractor import RefractorForCausalLM
from tests.convert.runs import make_run

PLAIN = ["relation.local.window=128", "relation.global.summaries_per_block=0", "safety=open"]


def convert(source: Path, to: str, out: Path, *more: str) -> Path:
    assert main(["convert", str(source), "--to", to, "--out", str(out), *more]) == 0
    return out


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("model-*.safetensors")) for n, t in load_file(file).items()}


def dense_part(run: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Weights of a run's checkpoint under our HF names, without padding."""
    source = MegatronFolder(find_step(run), prefix)
    entries = table(Shape.of_run(RunConfig.load(run / "config.yaml")))
    return {
        target.name: tensor
        for entry in entries
        for target, tensor in zip(entry.tensors, entry.rule.split(source.read(entry.key, entry.expert)), strict=True)
        if not target.padding
    }


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_tiers_are_dropped_by_request_only_and_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: str
) -> None:
    """A mixture of experts with roles, rules, summaries, records, gates: its Mixtral part, and what that is not."""
    tiers = ["relation.combine=gated", "router.gate_features=true", "relation.global.levels=2", "model.vocab_size=700"]
    make_run(tmp_path / "run", *tiers, "relation.global.fanout=2")
    out = convert(tmp_path / "run", "mixtral", tmp_path / "out", "--drop-tiers", "--weights", weights)
    printed = capsys.readouterr()
    expected = dense_part(tmp_path / "run", "ema." if weights == "ema" else "")
    found = {our_name(name): tensor for name, tensor in weights_of(out).items()}
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())
    dropped = expected.keys() - found.keys()
    kinds = {"role_embeddings.weight", "summary_query", "group_query", "tier_gate_bias", "tier_gate_weight"}
    assert {name.rpartition("attn.")[2].removeprefix("model.") for name in dropped if "gate.feat" not in name} == kinds
    assert all(f"{name}: dropped by request" in printed.out for name in dropped) and len(dropped) == 1 + 2 * 5
    for part in ("summaries", "gated", "mask rules safety_restricted, tool_scope"):
        assert part in printed.out
    assert "warning:" in printed.err and "computes something else" in printed.err
    assert not any(name in printed.out for name in found), "what was kept is for --ledger"
    assert transformers.AutoConfig.from_pretrained(out).sliding_window == 32, "what Mixtral can express stays"
    assert isinstance(transformers.AutoModelForCausalLM.from_pretrained(out), transformers.MixtralForCausalLM)


def test_by_way_of_a_served_folder(tmp_path: Path) -> None:
    """Run -> HF -> Llama is run -> Llama."""
    make_run(tmp_path / "run", *PLAIN, "model.ffn.type=dense", "model.role_embeddings=false", "model.vocab_size=700")
    served = convert(tmp_path / "run", "hf", tmp_path / "hf")
    one = weights_of(convert(tmp_path / "run", "llama", tmp_path / "one"))
    two = weights_of(convert(served, "llama", tmp_path / "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    ids = torch.randint(0, 690, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two").eval()(ids).logits
        ours = RefractorForCausalLM.from_pretrained(served).eval()(ids).logits
    assert (theirs - ours).abs().max() <= 1e-5
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "two").eos_token == "<|eod|>"


def test_a_zero_role_table_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain text never leaves the row of its role, so many runs keep a table of zeros."""
    from refractor_megatron.checkpoint.store import Store
    from refractor_megatron.training.state import TrainState
    from tests.engine import engine_of

    cfg = make_run(tmp_path / "run", *PLAIN, "model.ffn.type=dense")
    engine = engine_of(cfg)  # as initialised: the table is zero
    state = TrainState(cfg, engine, "digest")
    state.progress.step = 9
    state.save(Store(tmp_path / "run" / "checkpoints", 2))
    out = convert(tmp_path / "run", "llama", tmp_path / "out", "--ledger")
    assert "zero throughout" in capsys.readouterr().out
    assert "model.role_embeddings.weight" not in weights_of(out)


def test_a_sliding_window_goes_to_mistral_and_mixtral_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    window = ["relation.local.window=24", *PLAIN[1:], "model.role_embeddings=false", "model.ffn.type=dense"]
    make_run(tmp_path / "run", *window)
    out = convert(tmp_path / "run", "mistral", tmp_path / "mistral")
    assert transformers.AutoConfig.from_pretrained(out).sliding_window == 24
    assert "window of 24" not in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "run"), "--to", "llama", "--out", str(tmp_path / "llama")]) != 0
    assert "sliding window of 24 tokens" in capsys.readouterr().err


def test_names_are_inverse() -> None:
    """Both ways, for every tensor of every model that has experts."""
    cfg = RunConfig()
    assert cfg.model.ffn.experts
    for name in (
        "model.embed_tokens.weight",
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.mlp.experts.17.gate_proj.weight",
        "model.layers.3.mlp.experts.17.up_proj.weight",
        "model.layers.3.mlp.experts.17.down_proj.weight",
        "model.layers.3.self_attn.q_proj.weight",
    ):
        assert our_name(foreign_name(name, "mixtral")) == name == foreign_name(name, "llama")
