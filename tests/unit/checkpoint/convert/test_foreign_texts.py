"""An imported model's text: its tokenizer as ours, rows for our special tokens, and its own files on the way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from refractor_megatron.cli import main
from refractor_megatron.config import RunConfig
from refractor_megatron.tokenizer import Tokenizer
from refractor_megatron.tokenizer.tokenizer import EOD, SPECIALS
from tests.convert.foreign import TINY, save, write_tokenizer
from tests.corpus import write_corpus

MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    return [path.read_text() for path in sorted(write_corpus(folder).iterdir())[:40]]


def tokenized(folder: Path, texts: list[str], name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A model that has an id for each of its tokens and no spare one for ours."""
    save(folder, name, dtype=dtype)
    write_tokenizer(folder, texts, reserved=0)
    config = json.loads((folder / "config.json").read_text())
    config |= {"bos_token_id": TINY["vocab_size"] - 2, "eos_token_id": TINY["vocab_size"] - 1, "pad_token_id": 7}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def convert(source: Path, to: str, out: Path, *more: str) -> Path:
    assert main(["convert", str(source), "--to", to, "--out", str(out), *more]) == 0
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llama tied, all heads their own"])
def test_rows_for_our_specials_come_and_go(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str], name: str, dtype: torch.dtype
) -> None:
    """Each added row is the mean of the source's; back again, every bit is as it was."""
    source = tokenized(tmp_path / "source", texts, name, dtype)
    run = convert(source, "megatron", tmp_path / "run", "--ledger")
    said = capsys.readouterr()
    cfg, tokenizer = RunConfig.load(run / "config.yaml"), Tokenizer.load(run / "tokenizer.json")
    grown = TINY["vocab_size"] + len(SPECIALS) - 1
    assert cfg.model.vocab_size == tokenizer.vocab_size == grown, "the end of a document was there already"
    assert f"grows from 600 to {grown}" in said.err and f"rows 600 to {grown - 1} added" in said.out
    before = weights_of(source)
    served = convert(run, "hf", tmp_path / "served")
    for key in [key for key in MATRICES if key in before]:
        found = weights_of(served)[key]
        mean = before[key].double().mean(0).to(dtype)
        assert torch.equal(found[:600], before[key]) and torch.equal(found[600:], mean.expand(grown - 600, -1))
    for path in (run, served, convert(source, "hf", tmp_path / "direct")):
        back = convert(path, "llama", tmp_path / f"{path.name}-back")
        after = weights_of(back)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (back / file).read_bytes() == (source / file).read_bytes()
        assert not (back / "chat_template.jinja").exists() and not (back / "refractor_tokenizer.json").exists()
        configs = [transformers.AutoConfig.from_pretrained(folder) for folder in (source, back)]
        for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(configs[0], key) == getattr(configs[1], key) is not None


def test_generate_reads_an_imported_folder(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tokenized(tmp_path / "source", texts)
    served = convert(source, "hf", tmp_path / "served")
    assert main(["convert", "verify", str(served)]) == 0
    capsys.readouterr()
    assert (
        main(["generate", str(served), "--prompt", "the kernel", "--max-tokens", "8", "--temperature", "0", "--json"])
        == 0
    )
    (row,) = json.loads(capsys.readouterr().out)["answers"]
    theirs = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    prompt = torch.tensor([theirs.encode("the kernel", add_special_tokens=False).ids])
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ends = [600 - 1, 600 - 2, 7]
    whole = model.generate(prompt, max_new_tokens=8, do_sample=False, suppress_tokens=ends)
    assert row["ids"][:8] == whole[0, prompt.shape[1] :].tolist()[: len(row["ids"])]


def test_a_tokenizer_of_another_model_is_not_attached(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "source", "llama")
    write_tokenizer(source, texts, vocab_size=640)
    run = convert(source, "megatron", tmp_path / "run")
    assert "has 640 ids and the model 600" in capsys.readouterr().err
    assert not (run / "tokenizer.json").exists() and RunConfig.load(run / "config.yaml").model.vocab_size == 600


def test_altered_source_files_are_found(tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = convert(tokenized(tmp_path / "source", texts), "megatron", tmp_path / "run")
    (run / "source_files" / "generation_config.json").write_text("{}")
    assert main(["convert", str(run), "--to", "llama", "--out", str(tmp_path / "back")]) != 0
    assert "generation_config.json is not what was imported" in capsys.readouterr().err
    assert not (tmp_path / "back").exists() and EOD in SPECIALS
