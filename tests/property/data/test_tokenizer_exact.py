"""Any bytes survive the tokenizer, whatever they spell."""

from __future__ import annotations

import argparse
import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.tokenizer import SPECIALS, Tokenizer, train_tokenizer
from refractor_megatron.tokenizer.pieces import bounded, training_pieces, utf8_runs

HOSTILE = st.lists(
    st.one_of(st.sampled_from([name.encode() for name in SPECIALS]), st.binary(max_size=20), st.text().map(str.encode))
).map(b"".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([inspect.getsource(argparse).encode(), b"<|system|> <|eod|> " * 200], 700)


@settings(max_examples=400)
@given(data=HOSTILE)
def test_round_trip_without_specials(tokenizer: Tokenizer, data: bytes) -> None:
    ids = tokenizer.encode(data)
    assert tokenizer.decode(ids) == data
    assert all(i < len(tokenizer.ranks) for i in ids)


@settings(max_examples=300)
@given(text=st.text(st.characters(), max_size=200))
def test_any_str_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode(errors="surrogatepass")


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 699), max_size=60))
def test_streaming_equals_decoding_at_once(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = tokenizer.stream_decoder()
    streamed = "".join(decoder.push(i) for i in ids) + decoder.flush()
    assert streamed == tokenizer.decode(ids).decode(errors="replace")


@given(data=HOSTILE)
def test_runs_and_pieces_lose_nothing(data: bytes) -> None:
    runs = list(utf8_runs(data))
    assert b"".join(run.encode() if isinstance(run, str) else run for run in runs) == data
    valid = "".join(run for run in runs if isinstance(run, str))
    assert "".join(training_pieces(data)) == valid
    pieces = list(bounded(valid, limit=7, reach=3))
    assert "".join(pieces) == valid and all(0 < len(piece) <= 7 for piece in pieces)
