"""Cuts of paragraphs against a naive twin, however the documents lie in shards."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dedup import paragraphs as module
from data_pipeline.dedup.paragraphs import audit_rows, cut_text, paragraph_duplicates, read_cuts
from data_pipeline.documents import Document, Part, plain
from data_pipeline.engine.tasks import Stage, task_folder
from data_pipeline.shards import Located, Shard, document_id, write_shard

_LEAST = 8
_PIECES = [
    b"one paragraph",
    b"one  paragraph ",
    b"another one here",
    b"short",
    b"\xff\xfe bytes \x80",
    b"\xe7\x8c\xab" * 4,
]
_GAPS = [b"\n\n", b"\n \t\n", b"\n\n\n\n", b"\n", b" ", b"\r\n\r\n", b"\n\x0c\n"]
_TEXTS = st.lists(st.one_of(st.sampled_from(_PIECES), st.sampled_from(_GAPS)), max_size=9).map(b"".join)
_CORPORA = st.lists(
    st.tuples(_TEXTS, st.booleans(), st.booleans()), min_size=1, max_size=7, unique_by=lambda one: one[:2]
)


def paragraphs(data: bytes) -> Iterator[tuple[int, int, int]]:
    """``(start, end, next)`` of each paragraph: its bytes, and where the one after it starts."""
    start = 0
    for blank in re.finditer(rb"\n(?:[ \t\r\f\v]*\n)+", data):
        yield start, blank.start(), blank.end()
        start = blank.end()
    yield start, len(data), len(data)


class Inline:
    """Does every task at once, here, and does not wait for the disk."""

    def run(self, stage: Stage, work: Path, log: object) -> Path:
        folder = stage.folder(work)
        for index in range(stage.count):
            out = task_folder(folder, index)
            out.mkdir(parents=True)
            getattr(module, stage.function.partition(":")[2])(stage.params, index, out)
        return folder


def _document(text: bytes, framed: bool) -> Document:
    return Document((Part(text, 1, 0),), framed=True) if framed else plain(text)


def _expected(corpus: list[tuple[bytes, bool, bool]]) -> dict[bytes, bytes]:
    """What is left of every document, by id, read straight from the definition."""
    owner: dict[tuple[bytes, ...], tuple[bytes, int]] = {}
    rows = [
        (document_id(_document(text, framed).key, "made"), text, kept and not framed) for text, framed, kept in corpus
    ]
    for name, text, active in rows:
        for number, (start, end, _) in enumerate(paragraphs(text)):
            words = tuple(text[start:end].split())
            if active:
                owner[words] = min(owner.get(words, (name, number)), (name, number))
    left: dict[bytes, bytes] = {}
    for name, text, active in rows:
        pieces = []
        for number, (start, end, after) in enumerate(paragraphs(text)):
            words = tuple(text[start:end].split())
            if not active or len(b" ".join(words)) < _LEAST or owner[words] == (name, number):
                pieces.append(text[start:after])
        left[name] = b"".join(pieces)
    return left


def _found(corpus: list[tuple[bytes, bool, bool]], cuts: list[int], folder: Path) -> dict[bytes, bytes]:
    paths, masks = [], []
    for number, places in enumerate(np.split(np.arange(len(corpus)), cuts)):
        chosen = [corpus[i] for i in places]
        path = folder / f"{number}.arrow"
        write_shard(path, 4, "made", [Located(_document(text, framed), 0, 1) for text, framed, _ in chosen])
        np.save(folder / f"{number}.npy", np.array([kept for _, _, kept in chosen], np.bool_))
        paths.append(path)
        masks.append(folder / f"{number}.npy")
    folders = paragraph_duplicates(paths, masks, Inline(), folder / "work", print, least=_LEAST)
    left: dict[bytes, bytes] = {}
    for path, one in zip(paths, folders, strict=True):
        shard, ranges = Shard(path), read_cuts(one)
        audit = {row.id: row for row in audit_rows(shard, one)}
        assert len(audit) == len(ranges)
        for row in range(len(shard)):
            name, text = shard.ids[row].tobytes(), shard.text_of(row)
            left[name] = cut_text(text, ranges.get(row, []))
            if row in ranges:
                entry = audit[name.hex()]
                assert entry.action == ("change" if left[name].strip() else "drop") and entry.source == 4
                assert entry.score is not None and abs(entry.score - (1 - len(left[name]) / len(text))) < 1e-12
    return left


@settings(max_examples=30, deadline=None)
@given(_CORPORA, st.lists(st.integers(0, 7), max_size=2))
def test_cuts_are_those_of_the_twin_in_any_shards(corpus: list[tuple[bytes, bool, bool]], cuts: list[int]) -> None:
    expected = _expected(corpus)
    for place, texts in enumerate((corpus, corpus[::-1])):
        with tempfile.TemporaryDirectory() as folder:
            assert (
                _found(texts, sorted(min(cut, len(texts)) for cut in cuts) if place else [], Path(folder)) == expected
            )
