from __future__ import annotations

import pytest

from refractor_megatron.tokenizer import Tokenizer
from refractor_megatron.tokenizer.pieces import TRAIN_RUN_CHARS, bounded, training_pieces, utf8_runs


@pytest.mark.parametrize("text", ["", "short", "x" * 1000, "line\n" * 300, "ab\n" + "y" * 500])
def test_bounded_pieces_concatenate(text: str) -> None:
    pieces = list(bounded(text, limit=100, reach=20))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 100 for piece in pieces)


def test_cut_prefers_a_line_end() -> None:
    assert list(bounded("a" * 90 + "\n" + "b" * 50, limit=100, reach=20)) == ["a" * 90 + "\n", "b" * 50]


def test_runs_alternate_and_concatenate() -> None:
    data = b"ok \xff\xfe\xc3\xa9 \x80"
    runs = list(utf8_runs(data))
    assert runs == ["ok ", b"\xff\xfe", "é ", b"\x80"]


def test_training_pieces_bound_words_and_spaces() -> None:
    data = b"w" * 1000 + b" " * 1000 + b"tail"
    pieces = list(training_pieces(data))
    assert "".join(pieces).encode() == data
    assert max(map(len, pieces)) <= 2 * TRAIN_RUN_CHARS


def test_stream_decoder_holds_back_unfinished_characters(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    smile = "\U0001f600".encode()
    assert [decoder.push(byte) for byte in smile] == ["", "", "", "\U0001f600"]
    assert decoder.push(smile[0]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(ord("a")) == "a"


def test_stream_decoder_prints_no_specials(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    assert [decoder.push(i) for i in (ord("a"), tokenizer.end, ord("b"))] == ["a", "", "b"]
