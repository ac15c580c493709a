"""Retrieval tasks: records among which one is the answer, a question, an answer.

* CONTINUATION: the question is a stretch of a document, the answer what follows it there. The records are neighbours of
  the continuation in other texts, never in its own or another part of it: the nearest is the label,
  next-nearest ones that are less similar by ``MARGIN`` are hard negatives. A neighbour more similar than ``CEILING``
  would give the answer away and is left out; without one that is nearer than chance there is no such task.
* LOOKUP: one record holds a phrase, chosen for its rare tokens; the others are that record's nearest neighbours in
  other texts, and do not hold it. The answer is the record's number and the words that follow the phrase in it.

The order of the records is drawn; each is a message of its own, role ``data`` in RET_SCOPE, as what a model retrieves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from data_pipeline.tasks.compose import Conversation, Kind, Made
from data_pipeline.tasks.keyed import Draws, hashes, key_of
from data_pipeline.tasks.library import Library
from data_pipeline.tasks.text import Places, Tokens, Vocabulary
from refractor_megatron.distinction.roles import MaskBit

#: Records of a task; the upper bound is the hard cap of records per call (specification section 16).
FEWEST, MOST = 3, 16
#: Cosine similarity above which text counts as the same, and by which a negative must be less similar than the answer.
CEILING, MARGIN = 0.85, 0.05
#: Neighbours looked up for each task.
SEARCHED = 4 * MOST
#: Tokens of a phrase and of what follows it; half as many where a record has no such line.
PHRASE, FOLLOWS = 8, 12
#: Phrases tried before a record is given up, and queries searched at a time.
_TRIES, _BATCH = 4, 256


@dataclass(frozen=True)
class _Query:
    """A chunk and its neighbours that may be shown, nearest first, one of a text."""

    row: int
    tokens: Tokens
    similarity: npt.NDArray[np.float32]
    rows: Places


class RetrievalTasks:
    """Tasks of one split. A chunk is used once in a stage; later stages begin where earlier ones ended."""

    def __init__(self, library: Library, vocabulary: Vocabulary, seed: int) -> None:
        self._library, self._vocabulary, self._seed = library, vocabulary, seed
        starts = library.index.records["start"]
        self._order = np.argsort(hashes(key_of(seed, "queries"), starts), kind="stable")
        self._next = 0
        self.rejected: Counter[str] = Counter()
        self._phrase = lru_cache(maxsize=None)(vocabulary.tokenizer.encode)

    def of_stage(self, stage: int, capacity: int) -> Iterator[Made]:
        """Tasks of at most ``capacity`` tokens, until the chunks have all been tried."""
        for done in range(0, len(self._order), _BATCH):
            places = (self._next + np.arange(min(_BATCH, len(self._order) - done))) % len(self._order)
            rows = self._order[places]
            found = self._library.search(rows, SEARCHED)
            for row, similarity, ids in zip(rows.tolist(), found.similarity, found.ids, strict=True):
                self._next = (self._next + 1) % len(self._order)
                made = self._task(self._query(row, similarity, ids), stage, capacity)
                if made is not None:
                    yield made

    def _query(self, row: int, similarity: npt.NDArray[np.float32], ids: npt.NDArray[np.int32]) -> _Query:
        shown = np.flatnonzero((ids >= 0) & (similarity <= CEILING))
        texts = self._library.index.documents[ids[shown]]
        shown = shown[np.sort(np.unique(texts, return_index=True)[1])]
        return _Query(row, self._chunk(row), similarity[shown], ids[shown].astype(np.int64))

    def _chunk(self, row: int) -> Tokens:
        record = self._library.index.records[row]
        return self._library.text.tokens(int(record["start"]), int(record["start"]) + int(record["length"]))

    def _task(self, query: _Query, stage: int, capacity: int) -> Made | None:
        draws = Draws(self._seed, "retrieval", stage, int(self._library.index.records["start"][query.row]))
        if len(query.rows) + 1 < FEWEST:
            self.rejected["too few neighbours"] += 1
            return None
        start = int(self._library.index.records["start"][query.row])
        follows_text = start - self._library.index.chunk >= int(self._library.run_start[query.row])
        near = query.similarity[0] > self._library.floor + MARGIN
        if follows_text and near and draws.below(4):  # fewer texts can be continued than looked up
            return self._continuation(query, draws, capacity)
        return self._lookup(query, draws, capacity)

    def _continuation(self, query: _Query, draws: Draws, capacity: int) -> Made | None:
        negatives = query.rows[query.similarity <= query.similarity[0] - MARGIN]
        start = int(self._library.index.records["start"][query.row])
        before = (start - self._library.index.chunk, start)
        question = self._phrase("One of the records is related to what comes next. Continue this text:\n")
        fixed = len(question) + self._library.index.chunk + len(query.tokens)
        rows = self._fitting(int(query.rows[0]), negatives, fixed, draws, capacity)
        if rows is None:
            return None
        talk, places = self._records(rows)
        label = rows.index(int(query.rows[0]))
        talk.open("user")
        talk.add(question)
        talk.copy(self._library.text.data.tokens, *before)
        talk.close()
        talk.open("assistant")
        answer = talk.copy(self._library.text.data.tokens, start, start + len(query.tokens))
        talk.close()
        return _made(Kind.CONTINUATION, talk, answer, places[label], label, len(rows))

    def _lookup(self, query: _Query, draws: Draws, capacity: int) -> Made | None:
        head, tail = self._phrase('Which record contains "'), self._phrase('"? Give its number and what follows.')
        fixed = len(head) + len(tail) + len(query.tokens)
        rows = self._fitting(query.row, query.rows, fixed, draws, capacity)
        if rows is None:
            return None
        others = b"\0".join(self._vocabulary.decode(self._chunk(row)) for row in rows if row != query.row)
        found = self._rare_phrase(query.tokens, others)
        if found is None:
            self.rejected["no phrase of its own"] += 1
            return None
        first, middle, last = found
        talk, places = self._records(rows)
        label = rows.index(query.row)
        talk.message("user", [*head, *query.tokens[first:middle], *tail])
        number = self._phrase(f"Record {label + 1}:")
        answer = talk.message("assistant", [*number, *query.tokens[middle:last]])
        at = places[label][0]
        return _made(Kind.LOOKUP, talk, answer, (at + first, at + last), label, len(rows))

    def _fitting(self, answer: int, negatives: Places, fixed: int, draws: Draws, capacity: int) -> list[int] | None:
        """The answer and as many negatives as drawn and fit, in a drawn order; None if there are too few."""
        lengths = self._library.index.records["length"]
        heading = len(self._phrase(f"Record {MOST}:\n")) + 2
        left = capacity - fixed - len(self._phrase(f"Record {MOST}:")) - 5 - heading - int(lengths[answer])
        rows = [answer]
        for row in negatives[: draws.between(FEWEST, MOST) - 1].tolist():
            left -= heading + int(lengths[row])
            if left < 0:
                break
            rows.append(row)
        if len(rows) < FEWEST:
            self.rejected["too few records that fit"] += 1
            return None
        return draws.shuffled(rows)

    def _records(self, rows: list[int]) -> tuple[Conversation, list[tuple[int, int]]]:
        """The conversation so far, and where the text of each record is."""
        talk = Conversation(self._vocabulary.tokenizer)
        places = []
        for number, row in enumerate(rows, 1):
            record = self._library.index.records[row]
            start = int(record["start"])
            talk.open("data", int(MaskBit.RET_SCOPE))
            talk.add(self._phrase(f"Record {number}:\n"))
            places.append(talk.copy(self._library.text.data.tokens, start, start + int(record["length"])))
            talk.close()
        return talk, places

    def _rare_phrase(self, tokens: Tokens, others: bytes) -> tuple[int, int, int] | None:
        """(first, middle, last): the rarest phrase ``first..middle-1`` that is nowhere else, and what follows it.

        It and what follows are whole words on one line.
        """
        own = self._vocabulary.decode(tokens)
        for size, follows in ((PHRASE, FOLLOWS), (PHRASE // 2, FOLLOWS // 2)):
            for first, middle, last in self._places(tokens, size, follows):
                phrase = self._vocabulary.decode(tokens[first:middle])
                if own.count(phrase) == 1 and phrase not in others and phrase.strip():
                    return first, middle, last
        return None

    def _places(self, tokens: Tokens, size: int, follows: int) -> list[list[int]]:
        """A few (first, middle, last), rarest phrases first: about ``size`` and then ``follows`` tokens of one line."""
        words = np.flatnonzero(self._vocabulary.begins_word[tokens])
        middle = np.searchsorted(words, words + size)
        ends = np.append(words, -1)  # -1: there is no such word
        last = np.searchsorted(words, ends[middle] + follows)
        found = np.stack([words, ends[middle], ends[last]], axis=1)
        broken = np.concatenate([[0], np.cumsum(~self._vocabulary.within_line[tokens])])
        found = found[(found[:, 1] > 0) & (found[:, 2] > 0) & (broken[found[:, 2]] == broken[found[:, 0]])]
        rarity = np.concatenate([[0], np.cumsum(self._library.rarity[tokens])])
        score = (rarity[found[:, 1]] - rarity[found[:, 0]]) / np.maximum(1, found[:, 1] - found[:, 0])
        few: list[list[int]] = found[np.argsort(-score, kind="stable")][:_TRIES].tolist()
        return few


def _made(
    kind: Kind, talk: Conversation, answer: tuple[int, int], evidence: tuple[int, int], label: int, records: int
) -> Made:
    tokens, spans = talk.finish()
    return Made(kind, tokens, spans, answer, (evidence,), tuple(talk.origins), label, records)
