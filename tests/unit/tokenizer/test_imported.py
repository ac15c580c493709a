"""Tokenizers of other models as ours: the same ids for the same text, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from refractor_megatron.errors import DataError
from refractor_megatron.tokenizer import SPECIALS, Tokenizer
from refractor_megatron.tokenizer.hf_files import write_hf_tokenizer
from refractor_megatron.tokenizer.imported import load_tokenizer
from tests.corpus import write_corpus

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RESERVED = [f"<|reserved_special_token_{n}|>" for n in range(12)]


def trained(texts: list[str], pre_tokenizer: Any, specials: list[str]) -> dict[str, Any]:
    """A byte-level BPE of 700 ids as a tokenizer.json, special tokens last."""
    one = tokenizers.Tokenizer(models.BPE())
    one.pre_tokenizer, one.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    one.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, show_progress=False, initial_alphabet=alphabet))
    one.add_special_tokens(specials)
    found: dict[str, Any] = json.loads(one.to_str())
    return found


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = write_corpus(tmp_path_factory.mktemp("text"))
    return [path.read_text() for path in sorted(folder.iterdir())[:60]]


@pytest.fixture(scope="module")
def gpt2(texts: list[str]) -> dict[str, Any]:
    """One regular expression inside the byte-level step, one special token."""
    return trained(texts, pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])


@pytest.fixture(scope="module")
def llama3(texts: list[str]) -> dict[str, Any]:
    """Llama 3's split, whole pieces taken as they are, every way to make a token listed, reserved special tokens."""
    split = pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    body = trained(texts, pre_tokenizers.Sequence([split, plain]), ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED])
    vocab = body["model"]["vocab"]
    merges = [
        (vocab[a], vocab[b], [a, b])
        for token in vocab
        for a, b in ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if a in vocab and b in vocab
    ]
    merges.sort(key=lambda merge: (vocab["".join(merge[2])], merge[0], merge[1]))
    body["model"] |= {"merges": [pair for *_, pair in merges], "ignore_merges": True}
    return body


@pytest.fixture(params=["gpt2", "llama3"])
def body(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A copy that a test may spoil."""
    found: dict[str, Any] = json.loads(json.dumps(request.getfixturevalue(request.param)))
    return found


def written(folder: Path, body: dict[str, Any]) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(body))
    return path


def test_ids_are_those_of_the_other_tokenizer(tmp_path: Path, body: dict[str, Any], texts: list[str]) -> None:
    path = written(tmp_path, body)
    ours, theirs = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    for text in [*texts, "naïve ſ 'S I'LL 12345 \u00a0\u2003 x", "", "\r\n\r\n \n", "🙂" * 30, " " * 50]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(b"\xff\xfe ok \x80")) == b"\xff\xfe ok \x80", "bytes that are no text survive"
    assert set(SPECIALS) <= {ours.special_name(i) for i in range(ours.vocab_size)}


def test_any_text_gets_the_same_ids(tmp_path_factory: pytest.TempPathFactory, gpt2: Any, llama3: Any) -> None:
    pairs = []
    for body in (gpt2, llama3):
        path = written(tmp_path_factory.mktemp("any"), body)
        pairs.append((load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))))

    @settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.text(
            st.one_of(st.sampled_from("aeionrst '\n\t1290.ABl"), st.characters(exclude_categories=["Cs"])), max_size=60
        )
    )
    def same(text: str) -> None:
        for ours, theirs in pairs:
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids

    same()


def test_special_tokens_keep_their_ids(tmp_path: Path, gpt2: Any, llama3: Any) -> None:
    """The end of a document is theirs; the other roles take reserved ids, or new ones after the last."""
    path = written(tmp_path, llama3)
    ours, theirs = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    assert ours.eod == theirs.token_to_id("<|end_of_text|>") and ours.vocab_size == theirs.get_vocab_size()
    assert ours.special_name(theirs.token_to_id("<|begin_of_text|>")) == "<|begin_of_text|>"
    reserved = {theirs.token_to_id(name) for name in RESERVED}
    assert {ours.pad, ours.end, *ours.role_ids.values()} <= reserved

    path = written(tmp_path, gpt2)
    ours, theirs = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    assert ours.eod == theirs.token_to_id("<|endoftext|>")
    assert ours.vocab_size == theirs.get_vocab_size() + len(SPECIALS) - 1


def test_saved_and_read_again(tmp_path: Path, body: dict[str, Any]) -> None:
    ours = load_tokenizer(written(tmp_path, body))
    ours.save(tmp_path / "ours.json")
    for again in (Tokenizer.load(tmp_path / "ours.json"), load_tokenizer(tmp_path / "ours.json")):
        assert again.digest == ours.digest and again.encode("It's 12 o'clock\n") == ours.encode("It's 12 o'clock\n")


def test_a_folder_that_we_exported(tmp_path: Path, body: dict[str, Any]) -> None:
    """Its tokenizer.json is Hugging Face's form of ours; ours lies beside it."""
    ours = load_tokenizer(written(tmp_path, body))
    write_hf_tokenizer(ours, tmp_path / "model", 128)
    assert load_tokenizer(tmp_path / "model").digest == ours.digest
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert again.encode("It's 12 o'clock", add_special_tokens=False).ids == ours.encode("It's 12 o'clock")


def normalizer(body: dict[str, Any]) -> None:
    body["normalizer"] = {"type": "NFC"}


def unigram(body: dict[str, Any]) -> None:
    body["model"]["type"] = "Unigram"


def byte_fallback(body: dict[str, Any]) -> None:
    body["model"]["byte_fallback"] = True


def metaspace(body: dict[str, Any]) -> None:
    body["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def prefix_space(body: dict[str, Any]) -> None:
    body["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def possessive(body: dict[str, Any]) -> None:
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}+|."}, "behavior": "Isolated", "invert": False}
    body["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, plain]}


def added_in_text(body: dict[str, Any]) -> None:
    body["added_tokens"][-1]["special"] = False


def special_first(body: dict[str, Any]) -> None:
    body["added_tokens"][0]["id"] = 0


def no_end(body: dict[str, Any]) -> None:
    for token in body["added_tokens"]:
        token["content"] = f"<|x{token['id']}|>"


def shuffled_merges(body: dict[str, Any]) -> None:
    body["model"]["merges"] = body["model"]["merges"][::-1]


def fewer_merges(body: dict[str, Any]) -> None:
    del body["model"]["merges"][40:60]


def no_vocabulary(body: dict[str, Any]) -> None:
    del body["model"]["vocab"]


REFUSED: dict[Callable[[dict[str, Any]], None], str] = {
    normalizer: "normalizer",
    unigram: "no byte-level BPE",
    byte_fallback: "no byte-level BPE",
    metaspace: "pre-tokenizer",
    prefix_space: "pre-tokenizer",
    possessive: "regular expression",
    added_in_text: "found in text",
    special_first: "special tokens",
    no_end: "ends a document",
    shuffled_merges: "order of the ids",
    fewer_merges: "cannot be reached",
    no_vocabulary: "not an intact",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_reproduced_is_refused(
    tmp_path: Path, body: dict[str, Any], spoil: Callable[[dict[str, Any]], None]
) -> None:
    spoil(body)
    with pytest.raises(DataError) as refusal:
        load_tokenizer(written(tmp_path, body))
    message = str(refusal.value)
    assert REFUSED[spoil] in message and "tokenizer.json" in message and "\n" not in message


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"model": 3}', b"\xff"])
def test_no_tokenizer_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="Cannot read"):
        load_tokenizer(tmp_path / "missing.json")
