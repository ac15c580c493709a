"""The text of a split that tasks may be made of, and what its tokens look like in bytes.

Left out: whatever the mask rules would not let a reader of plain context see (scopes, other roles), as for the
retrieval index; documents that may not be copied; special tokens, which only structure may place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.pack.indexed import Indexed, read_indexed
from data_pipeline.pack.records import read_records
from data_pipeline.provenance import FILE, HELDOUT_FILE, read_provenance
from data_pipeline.retrieval.build import eligible_runs
from refractor_megatron.distinction.roles import RecordPolicy
from refractor_megatron.tokenizer import Tokenizer

Tokens = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]
#: Table of provenance of each split.
PROVENANCE = {"train": FILE, "heldout": HELDOUT_FILE}
#: How far back a cut may move to the start of a line or word (tokens).
REACH = 128


class Vocabulary:
    """Bytes of every token, and which tokens end a line, begin a word, or hold neither line end nor quotation mark."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.specials = len(tokenizer.ranks)  # ids from here on are special
        self._bytes = (*tokenizer.ranks, *([b""] * (tokenizer.vocab_size - self.specials)))
        self.ends_line = np.array([token.endswith(b"\n") for token in self._bytes])
        self.within_line = np.array([token != b"" and not set(token) & set(b'\n\r"') for token in self._bytes])
        self.begins_word = np.array([token[:1] in (b" ", b"\n", b"\t") and token != b"" for token in self._bytes])

    def decode(self, tokens: npt.NDArray[np.integer[Any]]) -> bytes:
        """Bytes of ``tokens``; special ones give nothing."""
        table = self._bytes
        return b"".join([table[token] for token in tokens.tolist()])

    def boundary(self, tokens: npt.NDArray[np.integer[Any]], at: int) -> int:
        """The last line start at or before ``at`` within ``REACH``, else the last word start, else ``at``.

        0 counts as a line start.
        """
        low = max(0, at - REACH)
        if low == 0 and at == 0:
            return 0
        before = tokens[low:at]
        lines = np.flatnonzero(self.ends_line[before])
        if len(lines):
            return low + int(lines[-1]) + 1
        if low == 0:
            return 0
        words = np.flatnonzero(self.begins_word[before])
        return low + int(words[-1]) if len(words) else at


@dataclass(frozen=True)
class Text:
    """Runs of text of one split, in order of (source, place): each within one document and without special tokens.

    ``start``, ``stop``, ``document``: int64 [runs]; ``group``: int64 [sources + 1], first run of each source.
    ``whole``: int64 [documents], the number of the text that each is a part of.
    """

    data: Indexed
    start: Places
    stop: Places
    document: Places
    group: Places
    whole: Places
    refused: int  # documents that may not be copied

    @cached_property
    def ends(self) -> Places:
        """Running sum of the runs' lengths, int64 [runs + 1]."""
        return np.concatenate([[0], np.cumsum(self.stop - self.start)])

    @property
    def total(self) -> int:
        """Tokens of text."""
        return int(self.ends[-1])

    def tokens(self, start: int, stop: int) -> Tokens:
        """Tokens ``start..stop-1`` of the split."""
        return self.data.tokens[start:stop].astype(np.int32)


def read_text(draft: Path, split: str, vocabulary: Vocabulary, whole: Places | None = None) -> Text:
    """Opens ``<draft>/<split>.*`` and the split's table of provenance.

    ``whole``: int64 [documents], equal for documents that are parts of one text; None: each is a text of its own.

    Raises ``DataError`` for missing or damaged files.
    """
    mapped, records = read_indexed(draft / split), read_records(draft / split)
    data = Indexed(
        np.asarray(mapped.tokens), mapped.starts
    )  # still a map; views of it cost less than those of a memmap
    start, stop = _without_specials(data, *eligible_runs(records), vocabulary.specials)
    document = np.searchsorted(data.starts, start, side="right") - 1
    count = len(data.starts) - 1
    table = read_provenance(draft, count, PROVENANCE[split])
    allowed = (table["policy"] & RecordPolicy.ALLOW_COPY) != 0
    kept = allowed[document]
    start, stop, document = start[kept], stop[kept], document[kept]
    source = table["source"][document].astype(np.int64)
    whole = np.arange(count) if whole is None else whole
    assert len(whole) == count
    order = np.argsort(source, kind="stable")
    group = np.append(np.flatnonzero(np.diff(source[order], prepend=-1)), len(order))
    return Text(data, start[order], stop[order], document[order], group, whole, int(np.count_nonzero(~allowed)))


def _without_specials(data: Indexed, start: Places, stop: Places, specials: int) -> tuple[Places, Places]:
    """The runs without special tokens: plain documents lose their end, conversations are split at role and end tokens.

    Reads the tokens of conversations only: a plain document begins with text and has one special token, its last.
    """
    document = np.searchsorted(data.starts, start, side="right") - 1
    first, behind = data.starts[document], data.starts[document + 1]
    framed = np.asarray(data.tokens[first]) >= specials
    stop = np.where(stop == behind, stop - 1, stop)
    pieces = [np.stack([start[~framed], stop[~framed]])]
    for low, high in zip(start[framed].tolist(), stop[framed].tolist(), strict=True):
        cuts = np.flatnonzero(np.asarray(data.tokens[low:high]) >= specials) + low
        pieces.append(np.stack([np.append(low, cuts + 1), np.append(cuts, high)]))
    both = np.concatenate(pieces, axis=1)
    both = both[:, both[1] > both[0]]
    both = both[:, np.argsort(both[0], kind="stable")]
    return both[0], both[1]
