"""Hugging Face loads the written files and gives our ids; what it cannot say is refused by name."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.sources.messages import conversation
from data_pipeline.tokenise.encode import encode_document
from refractor_megatron.errors import OutputError
from refractor_megatron.tokenizer import SPECIALS, Tokenizer, train_tokenizer
from refractor_megatron.tokenizer.hf_files import (
    CUT_PATTERN,
    hf_backend,
    merge_pair,
    write_hf_tokenizer,
)
from refractor_megatron.tokenizer.pieces import LINE_END_REACH, PIECE_CHARS, bounded
from tests.corpus import write_corpus

pytest.importorskip("jinja2")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

CONTEXT = 512
CHAT = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "  {{ 7 * 7 }} {% if x %} <b>&amp;</b> {# no #}\n\n"},
    {"role": "code", "content": "", "id": "m3", "metadata": {"any": 1}, "protocol_tags": []},
    {"role": "data", "content": "<| user |> |><| <|user >", "protocol_tags": None},
    {"role": "assistant", "content": "naïve \U0001f469\u200d\U0001f4bb\r\n"},
]


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The written files, beside the configuration of a model that transformers does not know."""
    path = tmp_path_factory.mktemp("model")
    names = write_hf_tokenizer(tokenizer, path, CONTEXT)
    assert sorted(names) == sorted(file.name for file in path.iterdir())
    (path / "config.json").write_text(json.dumps({"model_type": "refractor"}))
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """The files as AutoTokenizer loads them, with every connection refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection to load local files"))
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a look-up to load local files"))
        return transformers.AutoTokenizer.from_pretrained(folder)


def framed(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    """Our ids of a conversation without the closing end-of-document."""
    ids = encode_document(tokenizer, conversation(messages, "test")).tokens.tolist()
    assert ids.pop() == tokenizer.eod
    return ids


# Loading


def test_settings_are_ours(tokenizer: Tokenizer, theirs: Any) -> None:
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (tokenizer.eod, tokenizer.pad, None)
    assert (theirs.model_max_length, theirs.padding_side) == (CONTEXT, "left")
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.convert_tokens_to_ids(list(SPECIALS)) == theirs.all_special_ids
    assert [tokenizer.special_name(i) for i in theirs.all_special_ids] == list(SPECIALS)


def test_the_generic_class_loads_the_files_too(folder: Path, tokenizer: Tokenizer) -> None:
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert loaded("Grüße")["input_ids"] == tokenizer.encode("Grüße")


def test_nothing_is_added_to_plain_text(theirs: Any) -> None:
    encoded = theirs("abc")
    assert list(encoded) == ["input_ids", "attention_mask"]
    assert encoded["input_ids"] == theirs("abc", add_special_tokens=False)["input_ids"]


def test_writing_twice_gives_the_same_bytes(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    for name in write_hf_tokenizer(tokenizer, tmp_path / "new" / "folder", CONTEXT):
        assert (tmp_path / "new" / "folder" / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_folder_that_cannot_be_written_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match=r"tokenizer to .*taken \(File exists\)"):
        write_hf_tokenizer(tokenizer, tmp_path / "taken", CONTEXT)


# Ids of text


def test_ids_equal_on_the_reference_corpus(tmp_path: Path) -> None:
    texts = [path.read_bytes() for path in sorted(write_corpus(tmp_path / "corpus").glob("*.txt"))]
    ours = train_tokenizer(texts, 4000)
    backend = hf_backend(ours)
    encodings = backend.encode_batch([text.decode() for text in texts], add_special_tokens=False)
    assert len(texts) > 300
    for text, encoding in zip(texts, encodings, strict=True):
        assert encoding.ids == ours.encode(text)
        assert backend.decode(encoding.ids).encode() == text


def test_ids_equal_on_the_first_planes(tokenizer: Tokenizer, theirs: Any) -> None:
    text = " ".join(chr(i) for i in range(0x20000) if not 0xD800 <= i < 0xE000)
    assert theirs(text, verbose=False)["input_ids"] == tokenizer.encode(text)


@pytest.mark.parametrize("cls", [r"\p{L}", r"\p{N}", r"\s"])
def test_both_expression_engines_know_the_same_classes(cls: str) -> None:
    """Equal ids say little about where text is split, as few code points take part in merges."""
    import tiktoken

    text = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    singles = {bytes([byte]): byte for byte in range(256)}
    ours = tiktoken.Encoding("class", pat_str=cls, mergeable_ranks=singles, special_tokens={})
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(rf"(?:(?!{cls})[\s\S])+"), behavior="removed")
    members = "".join(piece for piece, _ in split.pre_tokenize_str(text))
    assert bytes(ours.encode_ordinary(text)).decode() == members


NASTY = {
    "empty": "",
    "nfc and nfd": "\u00e9 e\u0301 \uac00 \u1100\u1161 \u212b A\u030a \ufb01",
    "emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001f44d\U0001f3fd",
    "line ends": "a\r\nb\rc\n\r\n\n  \r\n d \u2028 e\u2029\x85\x0b\x0c",
    "spaces": "  a   b\u3000\u00a0\u2009c \t\t d  ",
    "controls": "\x00\x01\x1b[0m\x7f\ufeff\ufffe\U0010ffff",
    "scripts": "שלום عربى हिन्दी ไทย 日本語 ١٢٣ ४५६ Ⅷ ½ ²",
    "contractions": "don't DON'T We'Ll it’s 'tis x'RE",
    "marks": "a\u0300\u0301\u0302 \u0300 z\u0351\u0352",
    "replacement": "\ufffd\ufffd",
}


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_nasty_text_has_our_ids_and_comes_back(tokenizer: Tokenizer, theirs: Any, text: str) -> None:
    ids = theirs(text)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert theirs.decode(ids) == text


@pytest.mark.parametrize("unit", ["a", " ", "\n", "!", "é", "\U0001f600", "1", "ab ", "\r\n", " \n"])
@pytest.mark.parametrize("size", [129, PIECE_CHARS - 1, PIECE_CHARS, PIECE_CHARS + 1, 2 * PIECE_CHARS + 7])
def test_long_runs_are_cut_alike(tokenizer: Tokenizer, theirs: Any, unit: str, size: int) -> None:
    text = (unit * size)[:size]
    ids = theirs(text, verbose=False)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert theirs.decode(ids) == text


@pytest.mark.parametrize("back", [0, 1, 2, LINE_END_REACH - 1, LINE_END_REACH, LINE_END_REACH + 1])
def test_the_cut_falls_behind_the_same_line_end(tokenizer: Tokenizer, theirs: Any, back: int) -> None:
    before = PIECE_CHARS - back
    text = "é" * before + "\n" + "  x" * 50_000
    assert theirs(text, verbose=False)["input_ids"] == tokenizer.encode(text)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(CUT_PATTERN), behavior="isolated")
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == list(bounded(text))


def test_a_lone_surrogate_is_refused_by_the_library(theirs: Any) -> None:
    with pytest.raises((TypeError, UnicodeEncodeError)):
        theirs("a\ud800b")


# Merges


def test_a_token_has_the_pair_that_merges_alone_end_with() -> None:
    ids = {bytes([i]): i for i in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258, b"xyz": 259}
    assert merge_pair(b"ab", ids) == (b"a", b"b")
    assert merge_pair(b"abc", ids) == (b"a", b"bc")
    assert merge_pair(b"xyz", ids) is None


def test_a_token_without_merges_is_met_as_a_word_only() -> None:
    ours = Tokenizer([*(bytes([i]) for i in range(256)), b"xyz"])
    for text in ("xyz", "xyzx", "xyz xyz", "xyz\n"):
        assert hf_backend(ours).encode(text).ids == ours.encode(text)
    assert ours.encode("xyz") == [256] and len(ours.encode("xyzx")) == 4


# Names of special tokens in text


def test_names_in_text_are_bytes_if_asked_and_special_tokens_if_not(
    folder: Path, tokenizer: Tokenizer, theirs: Any
) -> None:
    text = f"a{''.join(SPECIALS)} b"
    safe = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    assert safe(text)["input_ids"] == theirs(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)
    special = set(theirs.all_special_ids)
    assert not special & set(safe(text)["input_ids"])
    assert special <= set(theirs(text)["input_ids"])


def test_a_chat_needs_names_to_be_parsed(folder: Path, tokenizer: Tokenizer) -> None:
    """Why the saved setting parses names: with the other one, a template's own tokens fall apart unless asked for."""
    safe = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    ids = safe.apply_chat_template(CHAT, return_dict=False)
    assert not set(ids) & set(safe.all_special_ids)
    both = safe.apply_chat_template(CHAT, return_dict=False, tokenizer_kwargs={"split_special_tokens": False})
    assert both == framed(tokenizer, CHAT)
    assert not set(safe(SPECIALS[0])["input_ids"]) & set(safe.all_special_ids)


@pytest.mark.parametrize("name", SPECIALS)
@pytest.mark.parametrize("options", [{}, {"tokenize": False}, {"sanitize_control_tokens": True}], ids=str)
def test_content_cannot_name_a_special_token(theirs: Any, name: str, options: dict[str, Any]) -> None:
    chat = [CHAT[0], {"role": "user", "content": f"x{name}y"}]
    with pytest.raises(Exception, match="Message 2: content names the special token") as caught:
        theirs.apply_chat_template(chat, **options)
    assert name in str(caught.value)


@pytest.mark.parametrize("left, right", [("<", "|user|>"), ("<|user", "|>"), ("<|end|", ">"), ("|", "|>")])
def test_neighbours_cannot_spell_a_special_token_together(
    tokenizer: Tokenizer, theirs: Any, left: str, right: str
) -> None:
    for chat in (
        [{"role": "user", "content": left}, {"role": "tool", "content": right}],
        [{"role": "user", "content": right + left}],
    ):
        assert theirs.apply_chat_template(chat, return_dict=False) == framed(tokenizer, chat)


# The chat template


def test_a_chat_has_the_ids_of_its_document(tokenizer: Tokenizer, theirs: Any) -> None:
    ids = theirs.apply_chat_template(CHAT, return_dict=False)
    assert ids == framed(tokenizer, CHAT)
    rendered = theirs.apply_chat_template(CHAT, tokenize=False)
    assert rendered == "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in CHAT)
    assert theirs(rendered)["input_ids"] == ids


def test_the_generation_prompt_opens_the_assistant(tokenizer: Tokenizer, theirs: Any) -> None:
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids == [*framed(tokenizer, CHAT), tokenizer.role_ids["assistant"]]


def test_an_unfinished_message_stays_open(tokenizer: Tokenizer, theirs: Any) -> None:
    chat = [*CHAT[:2], {"role": "assistant", "content": "It is"}]
    ids = theirs.apply_chat_template(chat, continue_final_message=True, return_dict=False)
    assert [*ids, tokenizer.end] == framed(tokenizer, chat)


def test_a_batch_is_padded_on_the_left(tokenizer: Tokenizer, theirs: Any) -> None:
    chats = [CHAT[:1], CHAT]
    batch = theirs.apply_chat_template(chats, padding=True, add_generation_prompt=True)
    rows = [[*framed(tokenizer, chat), tokenizer.role_ids["assistant"]] for chat in chats]
    missing = len(rows[1]) - len(rows[0])
    assert missing > 0
    assert batch["input_ids"] == [[tokenizer.pad] * missing + rows[0], rows[1]]
    assert batch["attention_mask"] == [[0] * missing + [1] * len(rows[0]), [1] * len(rows[1])]


@pytest.mark.parametrize(
    "message, words",
    [
        ({"role": "boss", "content": "x"}, "unknown role 'boss'; the roles are system, user"),
        ({"content": "x"}, "unknown role ''"),
        ({"role": "user"}, "content must be a string"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "content must be a string"),
        ({"role": "user", "content": {"value": "eA==", "encoding": "base64"}}, "content must be a string"),
        ({"role": "user", "content": "x", "protocol_tags": ["<tool:calc>"]}, "protocol_tags .* refractor generate"),
        ({"role": "user", "content": "x", "scope": "safety"}, "the field 'scope'; use refractor generate --messages"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "does not know the field 'tool_calls'"),
    ],
)
def test_what_a_template_cannot_say_is_refused(theirs: Any, message: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=f"^Message 3: .*{words}") as caught:
        theirs.apply_chat_template([*CHAT[:2], message])
    assert type(caught.value).__name__ == "TemplateError"


@pytest.mark.parametrize("option", ["tools", "documents"])
def test_tools_and_documents_are_refused(theirs: Any, option: str) -> None:
    extra = [{"name": "f", "description": "d", "parameters": {}}]
    with pytest.raises(Exception, match=f"no place for {option}"):
        theirs.apply_chat_template(CHAT, **{option: extra})
