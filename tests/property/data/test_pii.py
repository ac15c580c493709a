"""Scrubbing leaves nothing behind, and the marks never hide a match."""

from __future__ import annotations

import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.filters import pii
from data_pipeline.filters.pii_rules import RULES

_PIECES = [
    b"jane@host.de", b"a.b", b"@", b"93.184.216.34", b".", b":", b"::", b"2a00:1450::200e", b"+49 30 1234567", b"+",
    b"0", b"(212) 736-5000", b"212-736-5000", b"-", b"/", b" ", b"\n", b"x", b"<", b">", b"tel. ", b"0301234567",
    b"4539148803436467", b"4539 1488 0343 6467", b"5425233430109903", b"AKIAIOSFODNN7ABCDEFG", b"api_key=",
    b"f81d4fae7dec11d0a76500a0c91e6bf6", b"sk-abcdefghij0123456789",
    b"eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.dozjgNryP4J3jVmN", b"version ", b"\xff", b"\xc2\xa7", b"_",
    b"-----BEGIN PRIVATE KEY-----", b"-----END PRIVATE KEY-----", b"MIIEpAIBAAKCAQEA1b2c", b"<EMAIL>", b"\xe9",
    b"8.8.8.8",
]  # fmt: skip
_TEXTS = st.lists(st.one_of(st.sampled_from(_PIECES), st.binary(max_size=6)), max_size=14).map(b"".join)


@settings(max_examples=400, deadline=None)
@given(_TEXTS)
def test_scrubbed_text_has_no_match_left(data: bytes) -> None:
    scrubbed, replaced = pii.scrub(data)
    assert pii.scrub(scrubbed) == (scrubbed, dict.fromkeys(pii.KINDS, 0))
    flat = np.frombuffer(scrubbed, np.uint8)
    assert not any(column[0] for column in pii.count(flat, np.array([0, len(flat)], np.int64)).values())
    assert not any(list(rule.find(scrubbed)) for rule in RULES)  # without the marks as well
    assert any(replaced.values()) == (scrubbed != data)


@settings(max_examples=400, deadline=None)
@given(st.lists(_TEXTS, max_size=4))
def test_counts_are_those_of_each_document_without_marks(texts: list[bytes]) -> None:
    flat = np.frombuffer(b"".join(texts), np.uint8)
    offsets = np.append(0, np.cumsum([len(text) for text in texts])).astype(np.int64)
    found = pii.count(flat, offsets)
    for row, text in enumerate(texts):
        taken: list[tuple[int, int]] = []
        expected = dict.fromkeys(pii.KINDS, 0)
        for rule in RULES:
            mine: list[tuple[int, int]] = []
            for start, end in sorted(rule.find(text), key=lambda span: (span[0], -span[1])):
                if all(end <= low or start >= high for low, high in taken + mine):
                    mine.append((start, end))
                    expected[rule.kind] += 1
            taken += mine
        assert {kind: int(column[row]) for kind, column in found.items()} == expected


@settings(max_examples=200, deadline=None)
@given(_TEXTS)
def test_what_lies_between_matches_stays(data: bytes) -> None:
    """The scrubbed text is the old one with pieces replaced: its own pieces occur in the old text in order."""
    scrubbed, _ = pii.scrub(data)
    at = 0
    for piece in re.split(b"|".join(rule.placeholder for rule in pii.RULES), scrubbed):
        at = data.find(piece, at)
        assert at >= 0
        at += len(piece)
