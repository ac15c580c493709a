"""From a checkpoint of Megatron's to text: ``refractor convert``, then ``refractor generate``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refractor_megatron.cli import main
from tests.convert.runs import make_run


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano run with random weights, exported in float32."""
    root = tmp_path_factory.mktemp("converted")
    make_run(root / "run", "router.gate_features=true")
    assert main(["convert", str(root / "run"), "--to", "hf", "--out", str(root / "hf"), "--weights", "ema"]) == 0
    return root / "hf"


def test_generate_is_what_transformers_generates(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy, from a conversation: our prompt is the chat template's, our records are those derived from the ids."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the kernel " * 4}]
    (tmp_path / "m.json").write_text(json.dumps(messages))
    options = ["--messages", str(tmp_path / "m.json"), "--max-tokens", "24", "--temperature", "0", "--json"]
    assert main(["generate", str(converted), *options]) == 0
    out, err = capsys.readouterr()
    (row,) = json.loads(out)["answers"]
    tokenizer = AutoTokenizer.from_pretrained(converted)  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(converted, trust_remote_code=True, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    stops = [tokenizer.convert_tokens_to_ids(name) for name in ("<|end|>", "<|eod|>")]
    hidden = [i for i in tokenizer.all_special_ids if i not in stops]
    with torch.no_grad():
        whole = model.generate(**ids, max_new_tokens=24, do_sample=False, eos_token_id=stops, suppress_tokens=hidden)
    assert row["ids"] == whole[0, ids["input_ids"].shape[1] :].tolist() and err == ""


def test_a_run_is_no_exported_folder(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = converted.parent / "run"
    assert main(["generate", str(run), "--prompt", "x"]) == 4
    assert f"error: {run} is a training run: refractor convert {run} --to hf --out OUT" in capsys.readouterr().err
