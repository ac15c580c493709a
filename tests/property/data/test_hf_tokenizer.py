"""Hugging Face's encoder gives our ids for any text, any table and any conversation."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_pipeline.sources.messages import conversation
from data_pipeline.tokenise.encode import encode_document
from refractor_megatron.distinction.roles import ROLES
from refractor_megatron.tokenizer import SPECIALS, Tokenizer, train_tokenizer
from refractor_megatron.tokenizer.hf_files import CUT_PATTERN, hf_backend, write_hf_tokenizer
from refractor_megatron.tokenizer.pieces import LINE_END_REACH, PIECE_CHARS, bounded

pytest.importorskip("jinja2")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

CHARACTERS = st.characters(exclude_categories=["Cs"])
#: Text with what the split, the merges and the search for special tokens may stumble over.
TEXT = st.lists(
    st.one_of(
        st.text(CHARACTERS, max_size=12),
        st.text(" \t\r\n\u3000\u00a0", max_size=6),
        st.sampled_from(
            ["don't", "DON'T", "self.parser", "add_argument", "123456", "e\u0301", "<|", "|>", "<|user", ">"]
        ),
        st.sampled_from(
            ["\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "'ll", "    def ", "\r\n\r\n", "a" * 300]
        ),
    ),
    max_size=12,
).map("".join)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": TEXT})


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return train_tokenizer([inspect.getsource(argparse).encode(), "naïve e\u0301 \U0001f469\u200d".encode() * 50], 1200)


@pytest.fixture(scope="module")
def theirs(ours: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("model")
    write_hf_tokenizer(ours, folder, 4096)
    return transformers.AutoTokenizer.from_pretrained(folder)


def names_none(text: str) -> bool:
    return not any(name in text for name in SPECIALS)


@settings(max_examples=500)
@given(text=TEXT)
def test_text_has_our_ids_and_comes_back(ours: Tokenizer, theirs: Any, text: str) -> None:
    assume(names_none(text))
    ids = theirs(text)["input_ids"]
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == text


@settings(max_examples=200)
@given(parts=st.lists(st.one_of(st.sampled_from(SPECIALS), TEXT), max_size=6))
def test_split_special_tokens_never_yields_one(ours: Tokenizer, theirs: Any, parts: list[str]) -> None:
    text = "".join(parts)
    assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text)


@settings(max_examples=300)
@given(
    words=st.lists(st.text("abc ", min_size=2, max_size=7), unique=True, max_size=40),
    texts=st.lists(st.text("abc ", max_size=40), min_size=1, max_size=8),
)
def test_any_table_has_our_ids(words: list[str], texts: list[str]) -> None:
    """Tables that no training would give: tokens with several or no pairs, long ones before short ones."""
    table = Tokenizer([*(bytes([i]) for i in range(256)), *(word.encode() for word in words)])
    backend = hf_backend(table)
    for text in [*texts, "".join(texts)]:
        assert backend.encode(text).ids == table.encode(text)


@settings(max_examples=200)
@given(chat=st.lists(MESSAGE, min_size=1, max_size=5), prompt=st.booleans())
def test_a_chat_has_the_ids_of_its_document(
    ours: Tokenizer, theirs: Any, chat: list[dict[str, str]], prompt: bool
) -> None:
    assume(all(names_none(message["content"]) for message in chat))
    document = encode_document(ours, conversation(chat, "test")).tokens.tolist()
    tail = [ours.role_ids["assistant"]] if prompt else []
    ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
    assert [*ids, ours.eod] == [*document[:-1], *tail, ours.eod]


@settings(max_examples=100)
@given(chat=st.lists(MESSAGE, min_size=1, max_size=3), at=st.integers(0, 2), name=st.sampled_from(SPECIALS))
def test_a_chat_never_holds_a_name_from_content(theirs: Any, chat: list[dict[str, str]], at: int, name: str) -> None:
    chat[at % len(chat)]["content"] += name
    with pytest.raises(Exception, match="content names the special token"):
        theirs.apply_chat_template(chat)


@settings(max_examples=40)
@given(
    lines=st.lists(
        st.tuples(
            st.sampled_from("xé\U0001f600 \r"),
            st.integers(0, 2 * LINE_END_REACH) | st.integers(PIECE_CHARS - LINE_END_REACH - 2, PIECE_CHARS + 2),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_long_text_is_cut_where_ours_is(lines: list[tuple[str, int]]) -> None:
    text = "\n".join(unit * count for unit, count in lines)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(CUT_PATTERN), behavior="isolated")
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == list(bounded(text))
