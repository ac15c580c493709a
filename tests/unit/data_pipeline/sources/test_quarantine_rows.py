"""What a row of the quarantine holds, whatever the entry was."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.sources.base import Bad
from data_pipeline.sources.ingest import _row


@given(st.text(st.characters()), st.binary(max_size=300))
def test_texts_are_plain_utf8_strings(detail: str, sample: bytes) -> None:
    row = json.loads(json.dumps(_row(Bad("broken-json", detail).at(2, 5, sample), 1)))
    assert set(row) == {"reason", "source", "file", "position", "detail", "sample"}
    assert (row["source"], row["file"], row["position"]) == (1, 2, 5)
    for text in (row["detail"], row["sample"]):
        assert isinstance(text, str) and text.encode().decode() == text  # no lone surrogate
    assert row["detail"] == detail or any(0xD800 <= ord(one) < 0xE000 for one in detail)
    assert "\\" in row["sample"] or row["sample"].encode() == sample[:200]


def test_a_lone_surrogate_is_shown_as_an_escape() -> None:
    row = _row(Bad("wrong-schema", "field \ud800").at(0, 1, b"caf\xe9"), 0)
    assert (row["detail"], row["sample"]) == ("field \\ud800", "caf\\xe9")
