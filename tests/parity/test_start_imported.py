"""A Llama, imported and continued with tiers on its own tokens: what a user does, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import transformers

from refractor_megatron.cli import main
from refractor_megatron.telemetry.sinks.jsonl import read_jsonl
from refractor_megatron.tokenizer import Tokenizer
from refractor_megatron.training.spawn import spawn
from tests.convert.foreign import save, write_tokenizer
from tests.corpus import write_corpus
from tests.warm import warm_ranks

pytestmark = [pytest.mark.slow, pytest.mark.gloo]
TIERS = ["relation.local.window=32", "relation.global.summaries_per_block=2", "relation.global.block_size=16"]
SHORT = ["train.steps=2", "train.schedule.warmup_steps=1", "train.global_batch=4", "train.micro_batch=2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llama`` as transformers writes it, with a tokenizer, and ``imported``, the run folder made of it."""
    root = tmp_path_factory.mktemp("imported")
    texts = [path.read_text() for path in sorted(write_corpus(root / "text").iterdir())]
    save(root / "llama", "llama")
    write_tokenizer(root / "llama", texts[:40])
    assert main(["convert", str(root / "llama"), "--to", "megatron", "--out", str(root / "imported")]) == 0
    return root


def prepare(root: Path, name: str, *more: str) -> Path:
    imported = str(root / "imported")
    command = ["pretrain", "--config", f"{imported}/config.yaml", "--weights", imported, "--corpus", str(root / "text")]
    command += ["--data-root", str(root / "data"), "--out", str(root / name), "--prepare-only", *more]
    assert main([*command, "telemetry=jsonl", "model.role_embeddings=true", *TIERS, *SHORT]) == 0
    return root / name


def train(run: Path, ranks: int) -> list[float]:
    with warm_ranks():
        assert spawn("refractor_megatron.training.worker", [str(run)], ranks) == 0
    return [record["loss"] for record in read_jsonl(run / "metrics.jsonl")]


def test_two_ranks_continue_it_as_one_does(root: Path) -> None:
    one = train(prepare(root, "one"), 1)
    two = train(prepare(root, "two", "--ranks", "2", "parallel.tp=2"), 2)
    assert two == pytest.approx(one, abs=1e-5) and len(one) == 2


def test_the_text_is_encoded_as_llama_would(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids of the data are those of the folder's own tokenizer; no note says that anything is unchecked."""
    run = prepare(root, "checked")
    assert "not checked" not in capsys.readouterr().err
    theirs = tokenizers.Tokenizer.from_file(str(root / "llama" / "tokenizer.json"))
    ours = Tokenizer.load(Path(json.loads((run / "data.json").read_text())["folder"]) / "tokenizer.json")
    text = (root / "text" / "document_003.txt").read_text()
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.eod == theirs.token_to_id("<|end_of_text|>") and ours.vocab_size == theirs.get_vocab_size()


def test_what_was_continued_goes_out_again(root: Path) -> None:
    """With its tiers as a REFRACTOR folder, without them as a Llama; the tokenizer goes along."""
    run = root / "one"
    if not (run / "metrics.jsonl").exists():
        train(prepare(root, "one"), 1)
    assert main(["convert", str(run), "--to", "hf", "--out", str(root / "served")]) == 0
    assert main(["convert", str(root / "served"), "--to", "llama", "--out", str(root / "dense"), "--drop-tiers"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "dense")
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert transformers.AutoTokenizer.from_pretrained(root / "dense").eos_token == "<|eod|>"


def test_a_model_without_spare_ids_is_continued(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its vocabulary grows by our special tokens, and what was trained goes out with all of them."""
    texts = [path.read_text() for path in sorted((root / "text").iterdir())]
    save(tmp_path / "full", "llama")
    write_tokenizer(tmp_path / "full", texts[:40], reserved=0)
    imported = tmp_path / "imported"
    assert main(["convert", str(tmp_path / "full"), "--to", "megatron", "--out", str(imported)]) == 0
    command = ["pretrain", "--config", f"{imported}/config.yaml", "--weights", str(imported), "--corpus"]
    command += [str(root / "text"), "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert main([*command, "--prepare-only", "telemetry=jsonl", *SHORT]) == 0
    losses = train(tmp_path / "run", 1)
    assert len(losses) == 2
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "run"), "--to", "llama", "--out", str(tmp_path / "back")]) == 0
    config = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    assert config.vocab_size == Tokenizer.load(imported / "tokenizer.json").vocab_size > 600
    assert config.eos_token_id == 599, "the end of a document is the source's own"
