"""Llama, Mistral and Mixtral in and out: the same logits by every path, the same bits back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from refractor_megatron.checkpoint.convert.foreign import ForeignFolder
from refractor_megatron.checkpoint.convert.mapping import to_megatron
from refractor_megatron.cli import main
from refractor_megatron.hf.modeling_refractor import RefractorForCausalLM
from refractor_megatron.transformation.sharded import shards
from tests.convert.foreign import MODELS, save, write_tokenizer
from tests.corpus import write_corpus
from tests.engine import engine_of, records_of


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder."""
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """By transformers' own class."""
    with torch.no_grad():
        out: torch.Tensor = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
    return out


def to(source: Path, kind: str, out: Path, *more: str) -> Path:
    """Convert without the comparison of logits, which these tests make themselves."""
    assert main(["convert", str(source), "--to", kind, "--out", str(out), "--no-logits", *more]) == 0
    return out


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_every_path_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    source = save(tmp_path / "source", name)
    ids = torch.randint(0, 600, (2, 96), generator=torch.Generator().manual_seed(1))
    expected = logits_of(source, ids)
    assert expected.abs().max() > 1

    ours = RefractorForCausalLM.from_pretrained(to(source, "hf", tmp_path / "hf")).eval()
    with torch.no_grad():
        assert (ours(ids).logits - expected).abs().max() <= 1e-5
        step = ours(ids[:, :90], use_cache=True)
        rest = ours(ids[:, 90:], past_key_values=step.past_key_values)
        assert (rest.logits - expected[:, 90:]).abs().max() <= 1e-5, "with the cache"

    folder = ForeignFolder(source)
    whole = to_megatron(folder.table, {own: folder.read(own) for own in folder.tensors})
    engine = engine_of(folder.model.cfg)
    with torch.no_grad():
        for shard in shards(engine.model):
            shard.data.copy_(whole[shard.key][shard.index].reshape(shard.data.shape))
    records = records_of([(96, 0, 0, "data", 0)]).expand(2, -1, -1)
    assert (engine.logits(ids, records)[..., :600] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("by", ["hf", "megatron"])
def test_round_trip_bit_for_bit(tmp_path: Path, name: str, by: str) -> None:
    """Foreign -> ours -> foreign: every tensor, and a configuration that means the same."""
    source = save(tmp_path / "source", name)
    family = MODELS[name][0]
    back = to(to(source, by, tmp_path / "ours"), family, tmp_path / "back")
    before, after = weights_of(source), weights_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (source, back)]
    assert _settled(configs[0]) == _settled(configs[1])
    assert (back / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


def _settled(config: dict) -> dict:
    """Without what says the same in two ways: head_dim null, and the names and versions of whoever wrote it."""
    head_dim = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    rope = {key: value for key, value in config["rope_parameters"].items() if not key.startswith("beta")}
    return {**config, "head_dim": head_dim, "rope_parameters": rope, "transformers_version": "", "_name_or_path": ""}


def test_experts_in_one_tensor_are_the_same_model(tmp_path: Path) -> None:
    """What transformers writes with ``save_original_format=False``."""
    save(tmp_path / "usual", "mixtral")
    fused = save(tmp_path / "fused", "mixtral", save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in weights_of(fused))
    usual, ours = ForeignFolder(tmp_path / "usual"), ForeignFolder(fused)
    assert usual.tensors.keys() == ours.tensors.keys()
    assert all(torch.equal(usual.read(name), ours.read(name)) for name in usual.tensors)
    assert weights_of(to(fused, "hf", tmp_path / "hf")).keys() == usual.tensors.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_survives(tmp_path: Path, dtype: torch.dtype) -> None:
    source = save(tmp_path / "source", "llama", dtype=dtype)
    back = to(to(source, "hf", tmp_path / "hf"), "llama", tmp_path / "back")
    before, after = weights_of(source), weights_of(back)
    assert all(torch.equal(before[key], after[key]) and after[key].dtype == dtype for key in before)
    assert json.loads((back / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    wide = to(source, "hf", tmp_path / "wide", "--dtype", "fp32")
    assert all(torch.equal(t, before[key].float()) for key, t in weights_of(wide).items())


def test_shards_and_leftovers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several shards; buffers of old versions, and a tied head that is stored twice, are named and left behind."""
    source = save(tmp_path / "source", "llama tied, all heads their own", max_shard_size="40kB")
    files = sorted(source.glob("*.safetensors"))
    assert len(files) > 2
    index_path = source / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    extra = {
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": weights_of(source)["model.embed_tokens.weight"],
    }
    save_file(extra, source / "extra.safetensors", {"format": "pt"})
    index["weight_map"] |= {name: "extra.safetensors" for name in extra}
    index["metadata"]["total_size"] += sum(t.nbytes for t in extra.values())
    index_path.write_text(json.dumps(index))
    for kind in ("hf", "megatron"):
        to(source, kind, tmp_path / kind, "--ledger")
        ledger = capsys.readouterr().out
        assert "rotary frequencies" in ledger and "lm_head.weight" in ledger
    assert weights_of(tmp_path / "hf").keys() == ForeignFolder(source).tensors.keys()


def test_what_the_command_says_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the comparison of logits on, all ways, and ``convert verify`` of the imported folder."""
    source = save(tmp_path / "source", "mixtral window, top 3")
    for kind in ("hf", "megatron"):
        assert main(["convert", str(source), "--to", kind, "--out", str(tmp_path / kind)]) == 0
        assert main(["convert", str(tmp_path / kind), "--to", "mixtral", "--out", str(tmp_path / f"{kind}-back")]) == 0
    said = capsys.readouterr().err
    assert said.count("logits equal those of transformers' mixtral") == 2
    assert main(["convert", "verify", str(tmp_path / "hf")]) == 0


def test_by_way_of_the_hf_folder_is_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Foreign -> HF -> Megatron and foreign -> Megatron: the same configuration, tokenizer and weights."""
    source = save(tmp_path / "source", "mixtral")
    texts = [path.read_text() for path in sorted(write_corpus(tmp_path / "text").iterdir())[:40]]
    write_tokenizer(source, texts)
    direct = to(source, "megatron", tmp_path / "direct")
    served = to(source, "hf", tmp_path / "hf")
    around = to(served, "megatron", tmp_path / "around")
    for name in ("config.yaml", "tokenizer.json", "source_files/tokenizer.json", "source_files.json"):
        assert (direct / name).read_bytes() == (around / name).read_bytes()
    one, two = (weights_of(to(run, "mixtral", run.with_name(f"{run.name}-back"))) for run in (direct, around))
    assert all(torch.equal(one[name], two[name]) for name in one)
    (source / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    capsys.readouterr()
    to(source, "megatron", tmp_path / "without")
    assert "gets no tokenizer" in capsys.readouterr().err and not (tmp_path / "without" / "tokenizer.json").exists()
