"""Puts a made document together, and the tables that say what is where in it.

A task is a conversation: context in messages of role ``data``, a question of the ``user``, the answer of the
``assistant``. All messages are of one segment: the mask class SEGMENT hides other segments, and the answer must be able
to read its evidence. What keeps the pieces of context apart is their own role and end tokens; no piece claims to go on
from the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from refractor_megatron.distinction.roles import DOCUMENT_ROLE, ROLE_ID
from refractor_megatron.tokenizer import Tokenizer


class Kind(IntEnum):
    """What a task asks. Those below ``NEEDLE`` are of the domain "retrieval", the others of "long_range"."""

    CONTINUATION = 0  # go on with a text; one record is the nearest to what follows
    LOOKUP = 1  # which record holds a phrase, and what follows it there
    NEEDLE = 2  # the value of one of several planted keys
    HOPS = 3  # a key that stands for a key that has a value
    QUOTE = 4  # real text: what follows a line that was quoted
    RECALL = 5  # several planted pairs at once (as MQAR, arXiv 2312.04927)


#: Stretches of evidence that a row of the table can hold.
EVIDENCE = 8
#: One row for each task document, in the order of the file. Positions are tokens within the document. ``evidence``:
#: (first, behind last) of each stretch, -1 where there are fewer. ``evidence_share``: the part of the evidence that is
#: more than ``Tasks.window`` tokens before the answer. ``label``: which record is the answer, from 0, of ``records``;
#: -1 for tasks without records. ``origin_first``, ``origin_count``: its rows in the table of origins; those of the
#: records come first, in the order shown.
TASK = np.dtype(
    [
        ("kind", "u1"),
        ("stage", "<i4"),
        ("evidence_share", "<f4"),
        ("answer_start", "<i4"),
        ("answer_length", "<i4"),
        ("evidence", "<i4", (EVIDENCE, 2)),
        ("label", "<i4"),
        ("records", "<i4"),
        ("origin_first", "<i8"),
        ("origin_count", "<i4"),
    ]
)
#: Text that was copied: ``length`` tokens at ``at`` of the task document ``task`` are those at ``start`` of the split,
#: in its document ``document``.
ORIGIN = np.dtype([("task", "<i4"), ("at", "<i4"), ("length", "<i4"), ("document", "<i4"), ("start", "<i8")])

Ids = Sequence[int] | npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Made:
    """A task document: ``tokens`` int32 [n]; ``spans`` int32 [k, 4] as in ``.rec``; ``origins`` (at, length, start)."""

    kind: Kind
    tokens: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]
    answer: tuple[int, int]  # first, behind last
    evidence: tuple[tuple[int, int], ...]
    origins: tuple[tuple[int, int, int], ...]
    label: int = -1
    records: int = 0


@dataclass
class Conversation:
    """A framed document in the making; the same tokens and spans as ``tokenise.encode`` gives for such messages."""

    tokenizer: Tokenizer
    at: int = 0  # tokens so far
    origins: list[tuple[int, int, int]] = field(default_factory=list)
    _parts: list[npt.NDArray[np.int32]] = field(default_factory=list)
    _spans: list[tuple[int, int, int]] = field(default_factory=list)  # length, role, bits
    _open: tuple[int, int, int] | None = None  # role, bits, first token of the message

    def open(self, role: str, bits: int = 0) -> None:
        """Begins a message."""
        assert self._open is None
        self._open = (ROLE_ID[role], bits, self.at)
        self.add([self.tokenizer.role_ids[role]])

    def add(self, ids: Ids) -> tuple[int, int]:
        """Adds tokens to the open message; returns (first, behind last)."""
        assert self._open is not None
        first = self.at
        self._parts.append(np.asarray(ids, dtype=np.int32))
        self.at += len(ids)
        return first, self.at

    def copy(self, tokens: npt.NDArray[np.integer[Any]], start: int, stop: int) -> tuple[int, int]:
        """Adds ``tokens[start:stop]`` of the split and notes where they are from."""
        if stop > start:
            self.origins.append((self.at, stop - start, start))
        return self.add(tokens[start:stop])

    def close(self) -> None:
        """Ends the message."""
        assert self._open is not None
        self.add([self.tokenizer.end])
        role, bits, first = self._open
        self._span(self.at - first, role, bits)
        self._open = None

    def message(self, role: str, ids: Ids, bits: int = 0) -> tuple[int, int]:
        """A whole message; returns where its content is."""
        self.open(role, bits)
        place = self.add(ids)
        self.close()
        return place

    def _span(self, length: int, role: int, bits: int) -> None:
        if self._spans and self._spans[-1][1:] == (role, bits):
            length += self._spans.pop()[0]
        self._spans.append((length, role, bits))

    def finish(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """(tokens, spans) with the end of the document."""
        assert self._open is None
        self._parts.append(np.array([self.tokenizer.eod], dtype=np.int32))
        self._span(1, ROLE_ID[DOCUMENT_ROLE], 0)
        self.at += 1
        spans = [(length, 0, role, bits) for length, role, bits in self._spans]
        return np.concatenate(self._parts), np.array(spans, dtype=np.int32)


def share_beyond(evidence: Sequence[tuple[int, int]], answer_start: int, window: int) -> float:
    """Part of the evidence tokens that no local window reaches when the answer's first token is predicted.

    That query stands at ``answer_start - 1`` and reads the ``window`` tokens up to itself; later ones reach less far.
    """
    total = sum(stop - start for start, stop in evidence)
    edge = answer_start - window
    beyond = sum(max(0, min(stop, edge) - start) for start, stop in evidence)
    return beyond / total if total else 0.0
