"""What people meet on the first day with downloaded models: every refusal says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from refractor_megatron.cli import main
from tests.convert.foreign import save, write_tokenizer
from tests.convert.runs import make_run
from tests.corpus import write_corpus

INDEX = "model.safetensors.index.json"


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int | None = None) -> str:
    """The one sentence of a command that fails."""
    found = main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert found != 0 if code is None else found == code
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def test_an_index_need_not_have_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """total_size is optional in the format; a missing shard is named, and the way out is the download."""
    source = save(tmp_path / "source", "llama", max_shard_size="40kB")
    index = json.loads((source / INDEX).read_text())
    del index["metadata"]
    (source / INDEX).write_text(json.dumps(index))
    assert main(["convert", str(source), "--to", "hf", "--out", str(tmp_path / "out"), "--no-logits"]) == 0
    shard = index["weight_map"]["model.norm.weight"]
    (source / shard).unlink()
    message = said(capsys, "convert", source, "--to", "hf", "--out", tmp_path / "again")
    assert shard in message and message.endswith("download it again.")
    (source / INDEX).write_text(json.dumps(["no", "index"]))
    assert "download it again" in said(capsys, "convert", source, "--to", "hf", "--out", tmp_path / "again")


@pytest.mark.parametrize("dtype", ["float7", 16])
def test_unknown_dtypes(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: object) -> None:
    source = save(tmp_path / "source", "llama")
    make_run(tmp_path / "run")
    assert main(["convert", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "hf"), "--no-logits"]) == 0
    for folder in (source, tmp_path / "hf"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        message = said(capsys, "convert", folder, "--to", "megatron", "--out", tmp_path / "out")
        assert f"dtype {dtype!r} is unknown; the known ones are float32, bfloat16, float16." in message


def test_where_nothing_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "source", "llama")
    assert "cannot be written" in said(capsys, "convert", source, "--to", "hf", "--out", "/proc/nope/deep")
    (tmp_path / "file").write_text("x")
    assert "is a file" in said(capsys, "convert", source, "--to", "hf", "--out", tmp_path / "file")


def test_what_is_a_folder_for_transformers_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "source", "llama")
    assert main(["convert", str(source), "--to", "hf", "--out", str(tmp_path / "hf"), "--no-logits"]) == 0
    message = said(capsys, "convert", tmp_path / "hf", "--to", "hf", "--out", tmp_path / "out")
    assert "is a folder for transformers already" in message
    message = said(capsys, "convert", source)
    assert "--to hf, megatron, llama, mistral, mixtral" in message


def test_an_interrupted_conversion_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from refractor_megatron.checkpoint.convert import foreign_import

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(foreign_import._HfImport, "_check_written", interrupt)
    source = save(tmp_path / "source", "llama")
    message = said(capsys, "convert", source, "--to", "hf", "--out", tmp_path / "out", code=130)
    assert message == "interrupted: nothing was written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_folder_written_by_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """save_pretrained leaves out refractor_tokenizer.json, which both commands need."""
    make_run(tmp_path / "run")
    assert main(["convert", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "hf"), "--no-logits"]) == 0
    saved = tmp_path / "saved"
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).save_pretrained(saved)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(saved)
    needle = (
        "refractor_tokenizer.json is missing, which save_pretrained does not write: copy it from the exported folder"
    )
    assert needle in said(capsys, "generate", saved, "--prompt", "x")
    assert needle in said(capsys, "convert", saved, "--to", "megatron", "--out", tmp_path / "out")
    shutil.copyfile(tmp_path / "hf" / "refractor_tokenizer.json", saved / "refractor_tokenizer.json")
    assert main(["generate", str(saved), "--prompt", "x", "--max-tokens", "2"]) == 0


def test_generate_with_a_tokenizer_that_cannot_be_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "source", "llama")
    write_tokenizer(source, [path.read_text() for path in sorted(write_corpus(tmp_path / "text").iterdir())[:20]])
    body = json.loads((source / "tokenizer.json").read_text())
    body["normalizer"] = {"type": "NFC"}
    (source / "tokenizer.json").write_text(json.dumps(body))
    assert main(["convert", str(source), "--to", "hf", "--out", str(tmp_path / "hf"), "--no-logits"]) == 0
    message = said(capsys, "generate", tmp_path / "hf", "--prompt", "x")
    assert "its tokenizer is not one that REFRACTOR can read: generate with transformers" in message
