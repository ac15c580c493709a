"""The compiled encoder against ``Tokenizer.encode``: the same ids for every sequence of bytes."""

from __future__ import annotations

from collections.abc import Sequence

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


def test_the_compiled_path_is_what_is_tested() -> None:
    assert all(encoder.compiled for encoder in ENCODERS.values())


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


def test_classes_are_the_expression_engines() -> None:
    import tiktoken

    ranks = {bytes([b]): b for b in range(256)}
    classes = fast.character_classes()
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    rest = tiktoken.Encoding("rest", pat_str=r"[^\s\p{L}\p{N}]", mergeable_ranks=ranks, special_tokens={})
    others = bytes(rest.encode_ordinary("".join(map(chr, points)))).decode()
    assert [p for p in points if classes[p] == 0] == [ord(char) for char in others]
    assert (classes[0xD800:0xE000] == 0).all()


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


def test_a_small_cache_changes_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "CACHE_ENTRIES", 2)
    small = FastEncoder(TRAINED)
    documents = [text.encode() for text in SAMPLES] * 2
    assert encoded(small, documents) == [TRAINED.encode(document) for document in documents]


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
    assert not encoder.compiled
    documents = [*(text.encode() for text in SAMPLES), b"", b"\xff\xfe"]
    assert encoded(encoder, documents) == [other.encode(document) for document in documents]
    assert encoded(encoder, []) == []
