"""Which characters make words."""

from __future__ import annotations

import hashlib
import unicodedata

import numpy as np
import pytest

from data_pipeline.dedup import shingles
from data_pipeline.dedup.shingles import TABLE, shingle
from tests.unit.data_pipeline.dedup.naive import flatten, naive_shingles


def sets(*texts: str, ngram: int = 5) -> list[set[int]]:
    hashes, starts = shingle(*flatten([text.encode() for text in texts]), ngram)
    return [set(hashes[starts[i] : starts[i + 1]].tolist()) for i in range(len(texts))]


def test_letters_make_words_and_spaces_dashes_and_brackets_separate() -> None:
    """But for a few marks of repetition, Khmer and CJK, and Ogham's and Cree's own brackets and hyphen."""
    kinds = {code: unicodedata.category(chr(code)) for code in range(0x10000)}
    letters = {code for code, kind in kinds.items() if kind in ("Ll", "Lu", "Lo", "Lm", "Nd")}
    spaces = {code for code, kind in kinds.items() if kind in ("Zs", "Zl", "Zp", "Cc", "Pd", "Ps", "Pe", "Pi", "Pf")}
    lost = {code for code in letters if not TABLE[code]}
    assert lost == {0x17D7, 0x2E2F, *range(0x3031, 0x3036), 0x303B, 0x303C}
    assert {code for code in spaces if TABLE[code]} == {0x1400, 0x169B, 0x169C}


def test_the_table_is_the_one_of_this_version() -> None:
    """Signatures of one normaliser are compared across Pythons, whose Unicode tables differ."""
    assert shingles.NORMALISER == "words-lower/1"
    assert hashlib.sha256(TABLE.astype("<u4").tobytes()).hexdigest()[:16] == "6f7d2e410ef1d98f"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The QUICK brown fox jumps, over!", "the quick -- brown\nfox\tjumps over"),
        ("ÉCOLE ÜBER ŁÓDŹ ŽLUŤOUČKÝ KŮŇ", "école über łódź žluťoučký kůň"),
        ("ΟΔΟΣ ΑΘΗΝΩΝ ΚΑΙ ΆΛΛΑ ΠΟΛΛΆ", "οδος αθηνων και άλλα πολλά"),
        ("ШИРОКАЯ ЭЛЕКТРИФИКАЦИЯ ЮЖНЫХ ГУБЕРНИЙ ЁЛКА", "широкая электрификация южных губерний ёлка"),
        ("TIẾNG VIỆT CÓ DẤU ĐẸP", "tiếng việt có dấu đẹp"),
        ("one\u00a0two\u2003three\u2014four\u3000five", "one two three four five"),
        ("“one” two… «three» ¿four? five。", "one two three four five"),
        ("ＡＢＣ ｄｅｆ １２３ four five", "abc DEF 123 four five"),
        ("one 😀 two three four 🎉five", "one two three four five"),
    ],
)
def test_same_words(one: str, other: str) -> None:
    first, second = sets(one, other)
    assert first == second


def test_scripts_without_spaces_take_longer_runs_of_characters() -> None:
    text = "自然言語処理は人間が日常的に使っている自然言語をコンピュータに処理させる一連の技術である"
    hashes, _ = shingle(*flatten([text.encode()]), 5)
    assert len(hashes) == len(text) - shingles.characters_for(5) + 1
    assert sets(text)[0] == sets("。".join(text))[0]  # punctuation between characters makes no difference


def test_script_is_chosen_by_document() -> None:
    english = "one two three four five six seven eight nine ten eleven twelve"
    alone, quoting = sets(english, english + " 漢字")
    assert len(alone) == 8 and alone < quoting


def test_short_documents_are_themselves() -> None:
    found = sets("a", "b", "a b", "b a", "", "!", "?", "a!", "one two three four")
    assert all(len(one) == 1 for one in found)
    assert found[0] == found[7]
    assert len({one.pop() for one in found}) == 8


@pytest.mark.parametrize(
    "data", [b"\xff\xfe", b"a\xc3", b"\xed\xa0\x80x", b"\xf4\x90\x80\x80", b"\xc0\xafab", b"\xe4\xb8A"]
)
def test_bytes_that_are_no_utf8_separate(data: bytes) -> None:
    for ngram in (1, 2):
        assert shingle(*flatten([data]), ngram)[0].tolist() == naive_shingles(data, ngram)


def test_rows_in_any_order() -> None:
    flat, offsets = flatten([b"one two three", b"four five six", b"seven"])
    hashes, starts = shingle(flat, offsets, 2)
    chosen, chosen_starts = shingle(flat, offsets, 2, np.array([2, 0]))
    assert chosen.tolist() == [*hashes[starts[2] :], *hashes[: starts[1]]]
    assert chosen_starts.tolist() == [0, 1, 3]
