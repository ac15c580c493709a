"""Which tokenizers become Hugging Face files, and that nothing else is read back from them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refractor_megatron.errors import DataError
from refractor_megatron.tokenizer import SPECIALS, Tokenizer
from refractor_megatron.tokenizer.hf_files import read_hf_tokenizer, write_hf_tokenizer
from refractor_megatron.tokenizer.pieces import SPLIT_PATTERN

pytest.importorskip("jinja2")
pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

CONTEXT = 512
TEXTS = [
    "don't WE'LL 1234567 x = {'a': 1}\r\n\n  \tend ",
    "naïve e\u0301 \U0001f469\u200d 日本語 ١٢٣٤ ſ's",
    "\x00\ufffd   \n",
]


# What can be written


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT_4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s"
)


@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, LLAMA_3, GPT_2, LLAMA_3.replace("{1,3}", "")])
def test_splits_of_other_models_are_kept(tokenizer: Tokenizer, tmp_path: Path, pattern: str) -> None:
    """With single bytes in another order too, as other models have them."""
    singles = sorted(tokenizer.ranks[:256], key=lambda byte: (not byte.isalnum(), byte))
    ours = Tokenizer([*singles, *tokenizer.ranks[256:]], pattern=pattern)
    write_hf_tokenizer(ours, tmp_path, CONTEXT)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == ours.encode(text)
        assert loaded.decode(ours.encode(text)) == text
    assert read_hf_tokenizer(tmp_path).digest == ours.digest


@pytest.mark.parametrize("pattern", [GPT_4, r"\p{N}{1,3}+|[^\p{N}]", r"\p{L}+", r"(?P<all>[\s\S])"])
def test_splits_that_the_engines_read_differently_are_refused(
    tokenizer: Tokenizer, tmp_path: Path, pattern: str
) -> None:
    with pytest.raises(DataError, match="expression engine reads otherwise"):
        write_hf_tokenizer(Tokenizer(tokenizer.ranks, pattern=pattern), tmp_path, CONTEXT)
    assert not list(tmp_path.iterdir())


def test_an_ordinary_token_with_a_special_name_is_refused(tmp_path: Path) -> None:
    ours = Tokenizer([*(bytes([i]) for i in range(256)), b"<|user|>"])
    with pytest.raises(DataError, match=r"'<\|user\|>' is also an ordinary token"):
        write_hf_tokenizer(ours, tmp_path, CONTEXT)


@pytest.mark.parametrize("extra", ["x<|end", "|><", "y<|end|>", "|>x", "<|en", "|>"])
def test_special_names_that_touch_are_refused(extra: str, tmp_path: Path) -> None:
    ours = Tokenizer([bytes([i]) for i in range(256)], specials=(*SPECIALS, extra))
    with pytest.raises(DataError, match=r"special tokens .* overlap"):
        write_hf_tokenizer(ours, tmp_path, CONTEXT)


def test_a_further_special_token_is_kept(tmp_path: Path) -> None:
    ours = Tokenizer([bytes([i]) for i in range(256)], specials=(*SPECIALS, '<|"É" $end|>'))
    write_hf_tokenizer(ours, tmp_path, CONTEXT)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.all_special_ids[-1] == ours.vocab_size - 1
    with pytest.raises(Exception, match="names the special token"):
        loaded.apply_chat_template([{"role": "user", "content": 'a<|"É" $end|>'}])
    assert read_hf_tokenizer(tmp_path).digest == ours.digest


# Reading back


@pytest.fixture
def copy(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    write_hf_tokenizer(tokenizer, tmp_path, CONTEXT)
    return tmp_path


def test_reading_gives_the_same_tokenizer(copy: Path, tokenizer: Tokenizer) -> None:
    assert read_hf_tokenizer(copy).digest == tokenizer.digest


def test_saving_by_transformers_keeps_it_the_same(copy: Path, tokenizer: Tokenizer) -> None:
    chat = [{"role": "user", "content": "Grüße\n"}]
    loaded = transformers.AutoTokenizer.from_pretrained(copy)
    before = loaded.apply_chat_template(chat)
    loaded(["a", "a longer row"], padding=True, truncation=True, max_length=4)
    loaded.save_pretrained(copy)
    body = json.loads((copy / "tokenizer.json").read_text())
    assert body["padding"] and body["truncation"]
    assert read_hf_tokenizer(copy).digest == tokenizer.digest
    again = transformers.AutoTokenizer.from_pretrained(copy)
    assert again.apply_chat_template(chat)["input_ids"] == before["input_ids"]


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "last merge gone": (lambda body: body["model"]["merges"].pop(), r"model\.merges"),
    "two merges swapped": (lambda body: body["model"]["merges"].insert(0, body["model"]["merges"].pop(1)), "merges"),
    "words by merges": (lambda body: body["model"].update(ignore_merges=False), r"model\.ignore_merges"),
    "two ids swapped": (lambda body: body["model"]["vocab"].update({"a": 98, "b": 97}), r"model\.vocab"),
    "a special token gone": (lambda body: body["added_tokens"].pop(), "added_tokens"),
    "a special token not special": (lambda body: body["added_tokens"][2].update(special=False), "added_tokens"),
    "a normalizer": (lambda body: body.update(normalizer={"type": "NFC"}), "normalizer"),
    "no cut": (lambda body: body["pre_tokenizer"]["pretokenizers"].pop(0), "pre_tokenizer"),
    "no decoder": (lambda body: body.update(decoder=None), "decoder"),
}


@pytest.mark.parametrize("edit, part", EDITS.values(), ids=EDITS)
def test_an_edited_file_is_refused(copy: Path, edit: Callable[[dict[str, Any]], object], part: str) -> None:
    path = copy / "tokenizer.json"
    body = json.loads(path.read_text())
    edit(body)
    path.write_text(json.dumps(body))
    with pytest.raises(DataError, match=rf"tokenizer\.json and refractor_tokenizer\.json differ in .*{part}"):
        read_hf_tokenizer(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_a_damaged_file_is_refused(copy: Path, content: bytes) -> None:
    (copy / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json is not an intact tokenizer file|differ in"):
        read_hf_tokenizer(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "refractor_tokenizer.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(DataError, match=rf"/{name} \(No such file"):
        read_hf_tokenizer(copy)


def test_the_module_needs_neither_torch_nor_transformers(copy: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from refractor_megatron.tokenizer.hf_files import *;"
        f"t = read_hf_tokenizer(Path({str(copy)!r})); write_hf_tokenizer(t, Path({str(copy / 'b')!r}), 8);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
