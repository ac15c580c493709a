"""Long-range tasks: the evidence lies further back than the local window, in text that fills a stage's sequence.

The context is real text: one long document, or several of one source, each a message of its own (role ``data``, no
scope). In it stand planted sentences (``plants``), or it is asked about itself: QUOTE asks what follows a line. The
sentences that the answer needs are placed anywhere beyond the window, others like them anywhere at all, so that their
form does not tell them apart. A task counts only if more than ``LEAST_SHARE`` of its evidence is measured to be beyond
the window and the answer is nowhere else in the context.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from data_pipeline.tasks import plants
from data_pipeline.tasks.compose import EVIDENCE, Conversation, Kind, Made, share_beyond
from data_pipeline.tasks.keyed import Draws
from data_pipeline.tasks.text import Text, Tokens, Vocabulary

#: Share of the evidence beyond the window that a task must exceed (specification section 9).
LEAST_SHARE = 0.8
#: Planted lines: one for so many tokens of the sequence, within bounds.
_TOKENS_PER_LINE, _LINES = 512, (4, 48)
#: Shortest stretch of a document that is put into the context (tokens), and tokens around a message's content.
_SHORTEST, _FRAME = 64, 2
#: QUOTE: tokens of the cue and of the answer, and places tried.
_CUE, _QUOTED, _TRIES = 16, 24, 8
#: Evidence must have at least this much room beyond the window (tokens).
_ROOM = 64
_FORMS = {Kind.NEEDLE: plants.needle, Kind.HOPS: plants.hops, Kind.RECALL: plants.recall}
_KINDS = (Kind.NEEDLE, Kind.HOPS, Kind.QUOTE, Kind.RECALL)


def possible(length: int, window: int) -> bool:
    """Whether sequences of ``length`` tokens can hold evidence beyond a window of ``window``."""
    return length >= window + 4 * _ROOM


@dataclass(frozen=True)
class _Plant:
    """Tokens to stand before place ``at`` of the context; ``answers``: their number among the evidence, or -1."""

    at: int
    ids: tuple[int, ...]
    answers: int


class LongRangeTasks:
    """Tasks of one split, each of exactly ``capacity`` tokens."""

    def __init__(self, text: Text, vocabulary: Vocabulary, window: int, seed: int) -> None:
        self._text, self._vocabulary, self._window, self._seed = text, vocabulary, window, seed
        kept = np.flatnonzero(text.stop - text.start >= _SHORTEST)
        self._start, self._stop = text.start[kept], text.stop[kept]
        group = np.searchsorted(text.group, kept, side="right")
        self._group = [*np.flatnonzero(np.diff(group, prepend=-1)).tolist(), len(kept)]
        self._ends = np.cumsum(self._stop - self._start)
        self.rejected: Counter[str] = Counter()
        self._encode = vocabulary.tokenizer.encode

    @property
    def total(self) -> int:
        """Tokens of text that contexts are taken from."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def of_stage(self, stage: int, capacity: int) -> Iterator[Made | None]:
        """Tasks number 0, 1, ..; None for one that was rejected. Without end: the caller counts."""
        assert possible(capacity, self._window)
        number = 0
        while True:
            draws = Draws(self._seed, "long-range", stage, number)
            kind = _KINDS[number % len(_KINDS)]
            made = self._quote(draws, capacity) if kind is Kind.QUOTE else self._planted(kind, draws, capacity)
            yield self._checked(made)
            number += 1

    def _checked(self, made: Made | None) -> Made | None:
        if made is not None and share_beyond(made.evidence, made.answer[0], self._window) <= LEAST_SHARE:
            self.rejected["evidence within the window"] += 1
            return None
        return made

    def _planted(self, kind: Kind, draws: Draws, capacity: int) -> Made | None:
        low, high = _LINES
        planted = _FORMS[kind](draws, min(high, max(low, capacity // _TOKENS_PER_LINE)))
        question, answer = self._encode(planted.question), self._encode(planted.answer)
        lines = [tuple(self._encode(line)) for line in (*planted.asked, *planted.others)]
        size = sum(map(len, lines))
        around = len(question) + len(answer) + 2 * _FRAME + 1
        stretches = self._context(draws, capacity - around - size)
        if stretches is None:
            return None
        context = b"\0".join(self._vocabulary.decode(self._text.tokens(*stretch)) for stretch in stretches)
        if any(name.encode() in context for name in planted.names):
            self.rejected["a planted name stands in the text"] += 1
            return None
        far = capacity - around - self._window - size - _FRAME * len(stretches)
        if far < _ROOM:
            self.rejected["no room beyond the window"] += 1
            return None
        first = _offsets(stretches)
        asked = len(planted.asked)
        placed = [
            _Plant(self._place(stretches, first, draws.below(far)), ids, n)
            if n < asked
            else _Plant(self._place(stretches, first, draws.below(first[-1])), ids, -1)
            for n, ids in enumerate(lines)
        ]
        talk, evidence = self._tell(stretches, placed)
        talk.message("user", question)
        return _made(kind, talk, talk.message("assistant", answer), evidence)

    def _quote(self, draws: Draws, capacity: int) -> Made | None:
        head, tail = self._encode('What follows these words above?\n"'), self._encode('"')
        around = len(head) + len(tail) + _CUE + _QUOTED + 2 * _FRAME + 1
        stretches = self._context(draws, capacity - around)
        if stretches is None:
            return None
        far = capacity - around - self._window - _FRAME * len(stretches) - _CUE - _QUOTED
        if far < _ROOM:
            self.rejected["no room beyond the window"] += 1
            return None
        parts = [self._text.tokens(*stretch) for stretch in stretches]
        context = b"\0".join(map(self._vocabulary.decode, parts))
        first = _offsets(stretches)
        for _ in range(_TRIES):
            at = self._place(stretches, first, draws.below(far))
            part = bisect_right(first, at) - 1
            words = parts[part][at - first[part] :][: _CUE + _QUOTED]
            cue = self._cue(words)
            if cue and self._only_there(words[:cue], words[cue:], context):
                talk, _ = self._tell(stretches, [])
                talk.message("user", [*head, *words[:cue], *tail])
                shown = _FRAME * part + 1 + at
                evidence = [(shown, shown + _CUE + _QUOTED)]
                return _made(Kind.QUOTE, talk, talk.message("assistant", words[cue:]), evidence)
        self.rejected["no line of its own"] += 1
        return None

    def _cue(self, words: Tokens) -> int:
        """How many of ``words`` are quoted: about ``_CUE``, up to the start of a word; 0 if it cannot be."""
        if len(words) < _CUE + _QUOTED:
            return 0
        starts = np.flatnonzero(self._vocabulary.begins_word[words[_CUE - 4 : _CUE + 4]])
        return _CUE - 4 + int(starts[0]) if len(starts) else 0

    def _only_there(self, cue: Tokens, answer: Tokens, context: bytes) -> bool:
        """Whether the words that are quoted and those asked for are each in the context once."""
        halves = self._vocabulary.decode(cue), self._vocabulary.decode(answer)
        return all(half.strip() and context.count(half) == 1 for half in halves)

    def _context(self, draws: Draws, room: int) -> list[tuple[int, int]] | None:
        """Stretches (start, stop) of the split that fill ``room`` tokens exactly, frames included.

        They begin at a place drawn from all text, so a long document is chosen as often as it has tokens. It is used
        alone if it is long enough; otherwise whole documents of its source follow, then those of the next source.
        """
        if room < _SHORTEST + _FRAME:
            self.rejected["no room for text"] += 1
            return None
        if self.total < 2 * room:
            self.rejected["too little text"] += 1
            return None
        place = draws.below(self.total)
        first = int(np.searchsorted(self._ends, place, side="right"))
        stretches = []
        for run in self._from(first):
            start, stop = int(self._start[run]), int(self._stop[run])
            if run == first and stop - start > room:
                start += self._snapped(start, draws.below(stop - start - (room - _FRAME) + 1))
            length = min(stop - start, room - _FRAME)
            left = room - _FRAME - length
            if 0 < left < _SHORTEST + _FRAME:  # too little for another one: leave more
                length -= _SHORTEST + _FRAME - left
                if length < _SHORTEST:
                    continue
            stretches.append((start, start + length))
            room -= _FRAME + length
            if room == 0:
                return stretches
        self.rejected["too little text"] += 1
        return None

    def _from(self, first: int) -> Iterator[int]:
        """All runs once: ``first``, the rest of its source, then the other sources."""
        group = bisect_right(self._group, first) - 1
        low, high = self._group[group], self._group[group + 1]
        yield from range(first, high)
        yield from range(low, first)
        yield from range(high, len(self._start))
        yield from range(low)

    def _snapped(self, start: int, offset: int) -> int:
        """``offset`` tokens into the run at ``start``, moved back to a line or word."""
        low = max(0, offset - 256)
        return low + self._vocabulary.boundary(self._text.tokens(start + low, start + offset), offset - low)

    def _place(self, stretches: list[tuple[int, int]], first: list[int], at: int) -> int:
        """Place ``at`` of the context moved back to a line or word of its stretch."""
        part = bisect_right(first, at) - 1
        return first[part] + self._snapped(stretches[part][0], at - first[part])

    def _tell(
        self, stretches: list[tuple[int, int]], placed: list[_Plant]
    ) -> tuple[Conversation, list[tuple[int, int]]]:
        """The context with its planted lines, and where the evidence is, in the order of ``answers``."""
        talk = Conversation(self._vocabulary.tokenizer)
        found: dict[int, tuple[int, int]] = {}
        waiting = sorted(placed, key=lambda plant: plant.at, reverse=True)
        before = 0
        for start, stop in stretches:
            talk.open("data")
            done = start
            while waiting and waiting[-1].at - before < stop - start:
                plant = waiting.pop()
                talk.copy(self._text.data.tokens, done, start + plant.at - before)
                done = start + plant.at - before
                place = talk.add(plant.ids)
                if plant.answers >= 0:
                    found[plant.answers] = place
            talk.copy(self._text.data.tokens, done, stop)
            talk.close()
            before += stop - start
        assert not waiting
        return talk, [found[n] for n in sorted(found)]


def _offsets(stretches: list[tuple[int, int]]) -> list[int]:
    """First place of each stretch in the context, and behind the last one the number of places."""
    return [0, *accumulate(stop - start for start, stop in stretches)]


def _made(kind: Kind, talk: Conversation, answer: tuple[int, int], evidence: list[tuple[int, int]]) -> Made:
    assert len(evidence) <= EVIDENCE
    tokens, spans = talk.finish()
    return Made(kind, tokens, spans, answer, tuple(evidence), tuple(talk.origins))
