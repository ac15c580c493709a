from __future__ import annotations

import subprocess
import sys
import time

import pytest

from refractor_megatron.distinction.roles import ROLES
from refractor_megatron.errors import DataError
from refractor_megatron.tokenizer import SPECIALS, Tokenizer, smallest_vocab, train_tokenizer

AWKWARD = [
    b"",
    b" ",
    b"plain words, don't WE'LL 12345",
    "naïve Ünïcode 日本語 \U0001f600\u200d\U0001f525 עברית".encode(),
    bytes(range(256)),
    b"valid \xff\xfe invalid \xc3",
    b"\xed\xa0\x80 surrogate in three bytes",
    b"\xf4\x90\x80\x80 above the last code point",
    b"\r\n\t\x00\x0b\x1c  \n\n",
]


@pytest.mark.parametrize("data", AWKWARD)
def test_round_trip_is_exact(tokenizer: Tokenizer, data: bytes) -> None:
    assert tokenizer.decode(tokenizer.encode(data)) == data


def test_str_and_its_bytes_have_equal_ids(tokenizer: Tokenizer) -> None:
    text = "Grüße, \u4f60\u597d"
    assert tokenizer.encode(text) == tokenizer.encode(text.encode())


def test_lone_surrogate_of_a_str_survives(tokenizer: Tokenizer) -> None:
    text = "a\ud800b"
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode(errors="surrogatepass")


def test_merges_are_used(tokenizer: Tokenizer, texts: list[bytes]) -> None:
    assert len(texts[0]) / len(tokenizer.encode(texts[0])) > 2


def test_special_names_in_text_are_plain_bytes(tokenizer: Tokenizer) -> None:
    text = "".join(SPECIALS).encode()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(tokenizer.special_name(i) is None for i in ids)


def test_special_ids_follow_the_ranks_and_print_nothing(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.eod, tokenizer.pad, tokenizer.end, *tokenizer.role_ids.values()]
    assert ids == list(range(len(tokenizer.ranks), tokenizer.vocab_size))
    assert list(tokenizer.role_ids) == list(ROLES)
    assert tokenizer.decode(ids) == b""
    assert tokenizer.decode(ids, show_specials=True) == "".join(SPECIALS).encode()
    assert tokenizer.token_bytes[ids].tolist() == [0] * len(ids)


def test_token_bytes_sum_to_the_text(tokenizer: Tokenizer, texts: list[bytes]) -> None:
    assert tokenizer.token_bytes[tokenizer.encode(texts[1])].sum() == len(texts[1])


def test_requested_vocabulary_is_reached(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 1000


def test_small_corpus_gives_a_smaller_vocabulary() -> None:
    small = train_tokenizer([b"hello hello"], 5000)
    assert smallest_vocab() < small.vocab_size < 300
    assert small.decode(small.encode(b"hello")) == b"hello"
    assert len(small.encode(b"hello")) == 1


def test_empty_corpus_gives_bytes() -> None:
    assert train_tokenizer([], 5000).vocab_size == smallest_vocab()


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match=r"264 is too small: 265.*model\.vocab_size"):
        train_tokenizer([b"x"], 264)


def test_training_stops_at_the_byte_cap() -> None:
    head, tail = b"abab " * 100, b"xyxy " * 100
    assert train_tokenizer([head, tail], 300, max_bytes=len(head)).digest == train_tokenizer([head], 300).digest


def test_training_skips_invalid_bytes() -> None:
    assert b"\xff\xff" not in train_tokenizer([b"\xff\xff\xff\xff abab abab"] * 5, 300).ranks


def test_training_is_deterministic_across_processes(tokenizer: Tokenizer) -> None:
    code = (
        "import argparse, typing, inspect; from refractor_megatron.tokenizer import train_tokenizer;"
        "print(train_tokenizer([inspect.getsource(m).encode() for m in (argparse, typing, inspect)], 1000).digest)"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == tokenizer.digest


def test_id_outside_the_vocabulary_is_named(tokenizer: Tokenizer) -> None:
    for bad in (1000, -1):
        with pytest.raises(DataError, match=f"Token id {bad} is outside"):
            tokenizer.decode([bad])


@pytest.mark.parametrize("unit", ["a", " ", "ab1", "\n", "é", "!", "\u3000"])
def test_giant_lines_take_linear_time(tokenizer: Tokenizer, unit: str) -> None:
    """Four times the text may take at most about eight times as long, and a megabyte a few seconds."""
    times = []
    for size in (250_000, 1_000_000):
        text = unit * (size // len(unit))
        start = time.process_time()
        ids = tokenizer.encode(text)
        times.append(time.process_time() - start)
        assert tokenizer.decode(ids) == text.encode()
    assert times[1] < 8 * times[0] + 0.5


def test_giant_random_line_trains_and_encodes() -> None:
    import random

    line = bytes(random.Random(0).choices(b"abcdefghijklmnopqrstuvwxyz", k=600_000))
    start = time.process_time()
    tokenizer = train_tokenizer([line], 600)
    assert tokenizer.decode(tokenizer.encode(line)) == line
    assert time.process_time() - start < 20
