"""The bulk encoder against ``Tokenizer.encode``: the same ids for every sequence of bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.tokenizer import Tokenizer, fast, train_tokenizer
from refractor_megatron.tokenizer.fast import FastEncoder
from refractor_megatron.tokenizer.pieces import LINE_END_REACH, PIECE_CHARS

SAMPLES = [
    "The quick brown foxes weren't jumping; they'll say it's 12,345.67 metres or 1/2.\n\n\tdef f(x):\n    return x",
    "Der schnelle Fuchs überspringt den Hund; größtenteils für 30 €.\r\n",
    "Le cœur déçu mais l'âme plutôt naïve, Louÿs rêva de crapaüter en canoë.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Съешь их ещё.",
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。寒來暑往，秋收冬藏。日月天地，宇宙玄黃。",
    "いろはにほへと ちりぬるを わかよたれそ つねならむ。カタカナと漢字が混ざる文章です。",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश करने वाले राम",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر ١٢٣٤",
    "👩‍👩‍👧‍👦 🏳️‍🌈 emoji, e\u0301 combining, ﬁ ligature, Ⅻ numerals ¼ ² ௧௨௩௪",
]
TRAINED = train_tokenizer([text.encode() * 3 for text in SAMPLES], 1200)


def _made() -> Tokenizer:
    """A vocabulary no trainer gives: a token that no merge reaches, tokens across and within wide characters."""
    more = ["日本", "本語", "天地玄", "  ", "   ", "ab", "bc", "abc", "'s", "\n\n", " 日", "12", "123", "aa", "aaaa"]
    table = [bytes([b]) for b in range(255, -1, -1)] + [text.encode() for text in more]
    table += ["語".encode()[:2], "本".encode()[2:] + b"\xe8", b"\xe6\x97", b"\xa5\xe6", b"unreachable"]
    return Tokenizer([*dict.fromkeys(table)])


VOCABULARIES = {"trained": TRAINED, "made": _made(), "bytes": Tokenizer([bytes([b]) for b in range(256)])}
ENCODERS = {name: FastEncoder(tokenizer) for name, tokenizer in VOCABULARIES.items()}

#: What the split pattern's alternatives and their order turn on.
NASTY = list(
    "aZé語日本0１Ⅻ'’sStTlLvVeErRmdD \t\r\n\x0b\x0c\x1c\x85\xa0\u2028\u3000\u200b\u180e.,!-_$€\u0301\u0e31😀ſ\0\ufeff"
)
nasty_text = st.lists(st.sampled_from([*NASTY, "'ll", "'VE", "'Re", "  ", "\r\n", "abc", "日本語"]), max_size=40).map(
    "".join
)
broken = st.lists(
    st.one_of(
        st.binary(max_size=5),
        st.text(max_size=8).map(str.encode),
        st.sampled_from(
            [b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xe6\x97", b"\xf0\x9f\x98", b"\xff", b"  \n"]
        ),
    ),
    max_size=12,
).map(b"".join)


def encoded(encoder: FastEncoder, documents: Sequence[bytes]) -> list[list[int]]:
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    ids, starts = encoder.encode_batch(np.frombuffer(b"".join(documents), dtype=np.uint8), offsets)
    assert ids.dtype == np.int32
    assert starts[0] == 0
    assert starts[-1] == len(ids)
    return [ids[a:b].tolist() for a, b in zip(starts[:-1], starts[1:], strict=True)]


def assert_equal(documents: Sequence[bytes], vocabularies: Sequence[str] = tuple(VOCABULARIES)) -> None:
    for name in vocabularies:
        found = encoded(ENCODERS[name], documents)
        for document, ids in zip(documents, found, strict=True):
            assert ids == VOCABULARIES[name].encode(document), (name, document[:200])


def test_the_fast_path_is_what_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [(text + "\n") * n + "it's 'quoted: ('Red')" for text in SAMPLES for n in (1, 2000)]
    wanted = [TRAINED.encode(document) for document in documents]
    monkeypatch.delattr(Tokenizer, "encode")
    assert encoded(ENCODERS["trained"], [document.encode() for document in documents]) == wanted


def test_a_library_that_cuts_otherwise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    monkeypatch.setattr(fast, "LIBRARY_PATTERN", gpt2)
    with pytest.raises(AssertionError, match="cuts text otherwise"):
        FastEncoder(TRAINED)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(nasty_text, st.text(max_size=60)).map(str.encode), max_size=4))
def test_text(documents: list[bytes]) -> None:
    assert_equal(documents)


@settings(max_examples=200, deadline=None)
@given(st.lists(broken, max_size=3))
def test_bytes_that_are_not_text(documents: list[bytes]) -> None:
    assert_equal(documents)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_real_text_cut_and_joined_anywhere(data: st.DataObject) -> None:
    joined = "".join(data.draw(st.lists(st.sampled_from(SAMPLES), min_size=1, max_size=4))).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(joined)), max_size=4)))
    bounds = [0, *cuts, len(joined)]
    assert_equal([joined[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)])


@pytest.mark.slow
def test_every_code_point_before_and_after_every_class() -> None:
    every = [chr(c) for c in [*range(0xD800), *range(0xE000, 0x110000)]]
    blocks = [every[i : i + 4000] for i in range(0, len(every), 4000)]
    assert_equal(["".join(f"{char}a{char}1{char}. {char}" for char in block).encode() for block in blocks], ["bytes"])
    few = every[:0x3200:3] + every[0x3200::97]
    assert_equal(["".join(f"{char}a{char}1{char}. {char}" for char in few).encode()], ["trained", "made"])


#: Contractions that the library takes and the split pattern does not, and their neighbours.
CONTRACTIONS = [f"'{a}{b}" for a in "lLvVrR" for b in "lLeE"] + ["'ſ", "'S", "'ll", "'", "''", "'R"]
around = st.sampled_from(
    ["", " ", "  ", "\t", "\n", "\r", "x", "é", "日", "1", ".", "(", "\u3000", "\u0301", "\n\n", "\nx"]
)
contractions = st.lists(st.tuples(around, st.sampled_from(CONTRACTIONS), around), max_size=8).map(
    lambda many: "".join(part for one in many for part in one).encode()
)


@settings(max_examples=150, deadline=None)
@given(st.lists(contractions, max_size=4))
def test_contractions_of_mixed_case(documents: list[bytes]) -> None:
    assert_equal(documents)


def test_every_contraction_between_every_two_neighbours() -> None:
    sides = ["", " ", "  ", "\t", "\n", "x", "日", "1", ".", "(", "\u3000", "\u0301", " \n", "\nx", "x\n "]
    assert_equal([f"{a}{quote}{b}".encode() for a in sides for quote in CONTRACTIONS for b in sides])


def test_contractions_in_and_at_the_cuts_of_long_documents() -> None:
    lines = [f"Line {i} of text, {'we' if i % 7 else ''}'Re here.\n{' ' * (i % 3)}more" for i in range(4000)]
    at_cut = "x" * (PIECE_CHARS - 1) + " 'Re " + "y" * PIECE_CHARS
    assert_equal(["\n".join(lines).encode(), at_cut.encode(), b"\xff" + at_cut.encode()], ["trained"])


@pytest.mark.parametrize(
    "unit", ["a", " ", "\n", "1", ".", "é", "日本語", "abc", "語", "\t ", "a\n", "'s", "\x80", "😀"]
)
def test_long_runs(unit: str) -> None:
    raw = unit.encode() if unit != "\x80" else b"\x80"
    assert_equal([raw * n + tail for n in (1, 7, 8, 9, 31, 33, 64, 65, 200, 1500) for tail in (b"", b" x", b"\n")])


@pytest.mark.parametrize("unit", ["a", "é", "語", "😀", " ", "word "])
@pytest.mark.parametrize(
    "line_end", [None, PIECE_CHARS - 1, PIECE_CHARS - LINE_END_REACH, PIECE_CHARS - LINE_END_REACH - 1]
)
def test_cuts_of_long_documents(unit: str, line_end: int | None) -> None:
    for size in (PIECE_CHARS, PIECE_CHARS + 1, 2 * PIECE_CHARS + 3):
        text = (unit * (size // len(unit) + 1))[:size]
        if line_end is not None:
            text = text[:line_end] + "\n" + text[line_end + 1 :]
        assert_equal([text.encode(), text.encode() + b"\xff" + text.encode()[: 4 * 100]], ["trained"])


def test_a_library_that_has_grown_is_loaded_afresh_and_no_id_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = itertools.count(0, fast.GROWTH_BYTES)  # of the process: one before a batch, one after
    monkeypatch.setattr(fast, "_resident", lambda: next(readings))
    encoder = FastEncoder(TRAINED)
    documents = [text.encode() for text in SAMPLES]
    libraries, found = [], []
    for _ in range(4):
        found.append(encoded(encoder, documents))
        libraries.append(encoder._library)
    assert libraries[0] is libraries[1]  # what grew by the ids themselves is not the library's
    assert libraries[1] is not libraries[2] is libraries[3]
    assert found == [[TRAINED.encode(document) for document in documents]] * 4


def test_threads_may_share_an_encoder() -> None:
    encoder, documents = FastEncoder(TRAINED), [(text * 50).encode() for text in SAMPLES]
    wanted = [TRAINED.encode(document) for document in documents]
    with ThreadPoolExecutor(4) as pool:
        assert all(found == wanted for found in pool.map(lambda _: encoded(encoder, documents), range(12)))


def test_state_left_by_other_documents_changes_no_id() -> None:
    encoder = FastEncoder(TRAINED)
    documents = [text.encode() for text in SAMPLES]
    first = encoded(encoder, documents)
    assert encoded(encoder, documents[::-1])[::-1] == first == encoded(encoder, documents)


def test_a_window_of_a_larger_buffer() -> None:
    data = np.frombuffer(b"before " + "日本 some words".encode() + b" after it", dtype=np.uint8)
    ids, starts = ENCODERS["made"].encode_batch(data, np.array([7, 10, 10, 24], dtype=np.int64))
    wanted = [VOCABULARIES["made"].encode(data[a:b].tobytes()) for a, b in ((7, 10), (10, 10), (10, 24))]
    assert [ids[a:b].tolist() for a, b in zip(starts[:-1], starts[1:], strict=True)] == wanted


def test_another_pattern_goes_through_tiktoken() -> None:
    other = Tokenizer(TRAINED.ranks, pattern=r"\s+|\S+")
    encoder = FastEncoder(other)
    assert not encoder.fast
    documents = [*(text.encode() for text in SAMPLES), b"", b"\xff\xfe"]
    assert encoded(encoder, documents) == [other.encode(document) for document in documents]
    assert encoded(encoder, []) == []
