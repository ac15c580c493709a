"""From arbitrary documents to samples: nothing is lost, moved or mislabelled."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.documents import Document, Part
from data_pipeline.pack.indexed import IndexedWriter, read_indexed
from data_pipeline.pack.records import RecordWriter, read_records
from data_pipeline.stream import SampleStream
from data_pipeline.tokenise.encode import encode_document
from refractor_megatron.tokenizer import train_tokenizer
from tests.unit.data_pipeline.cutting import cut_text

TOKENIZER = train_tokenizer([b"the cat sat on the mat with the hat " * 5], 290)
PARTS = st.lists(
    st.builds(Part, data=st.binary(max_size=12), role=st.integers(0, 5), bits=st.sampled_from([0, 4, 8, 24])),
    min_size=1,
    max_size=4,
)


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """A conversation whose segments grow, or a plain document."""
    parts = draw(PARTS)
    if draw(st.booleans()):
        return Document((Part(parts[0].data),))
    segments = np.cumsum([draw(st.booleans()) for _ in parts]).tolist()
    numbered = (Part(p.data, p.role, segment, p.bits) for p, segment in zip(parts, segments, strict=True))
    return Document(tuple(numbered), framed=True)


class Unsealed(SampleStream):
    """A stream over freshly packed files, without a manifest."""

    def __init__(self, prefix: Path, seq_len: int) -> None:
        self.seq_len, self.seed, self.split = seq_len, 3, "train"
        self.manifest: dict[str, Any] = {"content_sha256": "x"}
        self._data, self._records = read_indexed(prefix), read_records(prefix)
        self.tokens_total = int(self._data.starts[-1])
        self.samples_per_epoch = (self.tokens_total - 1) // seq_len


def token_by_token(many: list[Document]) -> tuple[list[int], list[tuple[int, int, int, int]]]:
    """The slow, obvious expansion: ids and (document, segment, role, bits) of every token."""
    ids: list[int] = []
    rows: list[tuple[int, int, int, int]] = []
    roles = list(TOKENIZER.role_ids.values())
    for number, document in enumerate(many):
        for part in document.parts:
            body = TOKENIZER.encode(part.data)
            framed = [roles[part.role], *body, TOKENIZER.end] if document.framed else body
            ids += framed
            rows += [(number, part.segment, part.role, part.bits)] * len(framed)
        ids.append(TOKENIZER.eod)
        rows.append((number, document.parts[-1].segment, 5, 0))
    return ids, rows


def renumbered(rows: list[tuple[int, int, int, int]]) -> list[list[int]]:
    """Document and segment counted from 0, the segment growing with either."""
    out, segment = [], 0
    for i, (document, _, role, bits) in enumerate(rows):
        segment += i > 0 and rows[i - 1][:2] != rows[i][:2]
        out.append([document - rows[0][0], segment, role, bits])
    return out


@settings(max_examples=120)
@given(many=st.lists(documents(), min_size=1, max_size=8), seq_len=st.integers(1, 20), data=st.data())
def test_samples_equal_the_token_by_token_expansion(many: list[Document], seq_len: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "train")
        tokens, records = IndexedWriter(prefix, TOKENIZER.vocab_size), RecordWriter(prefix)
        for document in many:
            encoded = encode_document(TOKENIZER, document)
            tokens.add(encoded.tokens)
            records.add(encoded.spans)
        tokens.close()
        records.close()
        ids, rows = token_by_token(many)
        stream = Unsealed(prefix, seq_len)
        assert stream.tokens_total == len(ids)
        if not stream.samples_per_epoch:
            return
        for number, sample in enumerate(stream.in_order()):
            window = slice(number * seq_len, (number + 1) * seq_len + 1)
            assert sample.tokens.tolist() == ids[window]
            assert sample.records.tolist() == renumbered(rows[window])
        n = stream.samples_per_epoch
        index = data.draw(st.integers(0, 5 * n))
        epoch = index // n
        visited = sorted(stream.sample(epoch * n + i).tokens.tobytes() for i in range(n))
        assert visited == sorted(sample.tokens.tobytes() for sample in stream.in_order())
        assert stream.sample(index).tokens.tobytes() in visited


@given(data=st.binary(max_size=300), limit=st.integers(8, 64))
def test_cut_text_loses_nothing(data: bytes, limit: int) -> None:
    parts = list(cut_text(data, limit))
    assert b"".join(parts) == data
    assert all(0 < len(part) <= limit for part in parts)


@given(text=st.text(max_size=100), limit=st.integers(8, 64))
def test_cut_text_keeps_characters_whole(text: str, limit: int) -> None:
    assert "".join(part.decode() for part in cut_text(text.encode(), limit)) == text
