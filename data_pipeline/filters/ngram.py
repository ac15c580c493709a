"""A small language model of one language: trigrams of words with interpolated modified Kneser-Ney smoothing.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", 1998, section 3; the highest order
uses counts, lower orders the number of distinct words seen before an n-gram. A document's first word has no context and
its second one word of it: a document is one sequence without marks for its start and end. Where counts are too few to
estimate discounts they are 0.5, 1 and 1.5, as in KenLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from numba import njit

from data_pipeline.dedup.shingles import TABLE, _words
from data_pipeline.filters.key_table import KeyTable, place_of

#: A word's number takes this many bits, so that a trigram is one exact 63-bit key.
WORD_BITS: Final = 21
_PAIR: Final = (1 << 2 * WORD_BITS) - 1  # the last two words of a key
_WORD: Final = (1 << WORD_BITS) - 1
_FALLBACK: Final = (0.5, 1.0, 1.5)
_SPLIT: Final = TABLE.copy()
_SPLIT[ord("0") : ord("9") + 1] = ord("0")  # years and sizes are not unknown words

Floats = npt.NDArray[np.float64]
Keys = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def word_hashes(text: npt.NDArray[np.uint8]) -> Hashes:
    """Hashes uint64 [words] of the words of UTF-8 ``text`` (uint8 [bytes]).

    Words as in ``dedup.shingles``, lower-cased, a character each in scripts without spaces; every digit counts as 0.
    """
    out = np.empty(
        len(text) // 2 + 2, np.uint64
    )  # a word and its separator take two bytes, an unspaced character three
    count, _ = _words(text, 0, len(text), _SPLIT, out)
    return out[:count].copy()


def discounts(counts: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    """What is taken from counts of 1, 2, and 3 or more: each in (0, its count). Chen and Goodman, equation 26."""
    once, twice, thrice, four = (int((counts == n).sum()) for n in (1, 2, 3, 4))
    if not (once and twice and thrice and four):
        return _FALLBACK
    share = once / (once + 2 * twice)
    found = (1 - 2 * share * twice / once, 2 - 3 * share * thrice / twice, 3 - 4 * share * four / thrice)
    return found if all(0 < taken < n for n, taken in enumerate(found, 1)) else _FALLBACK


def _smoothed(counts: npt.NDArray[np.int64], context: Keys) -> tuple[Floats, Keys, Floats]:
    """Of n-grams with ``counts``, grouped by ``context``: own share of the probability [n]; contexts; what is left
    there."""
    table = np.array([0.0, *discounts(counts)])
    taken = table[np.minimum(counts, 3)]
    contexts, first = np.unique(context, return_index=True)
    totals = np.add.reduceat(counts, first).astype(np.float64)
    left = np.add.reduceat(taken, first) / totals
    return (counts - taken) / np.repeat(totals, np.diff(np.append(first, len(counts)))), contexts, left


@dataclass(frozen=True)
class NgramModel:
    """``probability`` for the words of documents. Words are numbered from 1 in the order of their hashes; 0 is unknown.

    Arrays: ``vocabulary`` uint64 [V]; ``unigram`` float64 [V + 1] (complete probabilities); ``pairs``, ``triples``
    int64 sorted keys, ``pair_share``, ``triple_share`` their own share; ``pair_left`` [V + 1] what a context of one
    word leaves to the unigrams; ``contexts`` int64 sorted pairs and ``context_left`` what they leave to the bigrams.
    """

    vocabulary: Hashes
    unigram: Floats
    pairs: Keys
    pair_share: Floats
    pair_left: Floats
    triples: Keys
    triple_share: Floats
    contexts: Keys
    context_left: Floats

    @classmethod
    def train(cls, documents: Sequence[Hashes]) -> NgramModel:
        """From the word hashes of documents; at least one trigram and fewer than 2^21 distinct words."""
        vocabulary, numbers = np.unique(np.concatenate(documents), return_inverse=True)
        words = numbers.astype(np.int64) + 1
        size = len(vocabulary)
        assert size < _WORD
        place = _places([len(one) for one in documents])
        triples, triple_counts = np.unique(_keys(words, place, 3), return_counts=True)
        assert len(triples)
        pairs, pair_counts = np.unique(triples & _PAIR, return_counts=True)
        followers, follower_counts = np.unique(np.unique(_keys(words, place, 2)) & _WORD, return_counts=True)

        triple_share, contexts, context_left = _smoothed(triple_counts, triples >> WORD_BITS)
        pair_share, firsts, left = _smoothed(pair_counts, pairs >> WORD_BITS)
        own, _, root = _smoothed(follower_counts, np.zeros(len(followers), np.int64))
        unigram = np.full(size + 1, root[0] / (size + 1))
        unigram[followers] += own
        pair_left = np.ones(size + 1)
        pair_left[firsts] = left
        return cls(vocabulary, unigram, pairs, pair_share, pair_left, triples, triple_share, contexts, context_left)

    def numbers(self, words: Hashes) -> Keys:
        """Numbers int64 [n] of words with these hashes."""
        return self._tables["vocabulary"].find(words) + 1

    def probabilities(self, documents: Sequence[Hashes]) -> Floats:
        """Probability of each word after those before it in its document, float64 [words of all documents]."""
        words, place = self.numbers(np.concatenate(documents)), _places([len(one) for one in documents])
        found: Floats = _interpolated(
            words.view(np.uint64), place, self.unigram,
            (self._tables["pairs"].table, self.pair_share, self.pair_left),
            (self._tables["contexts"].table, self.context_left, self._first),
            (self.triples.view(np.uint64), self.triple_share),
        )  # fmt: skip
        return found

    @cached_property
    def _tables(self) -> dict[str, KeyTable]:
        return {name: KeyTable(getattr(self, name)) for name in ("vocabulary", "pairs", "contexts")}

    @cached_property
    def _first(self) -> Keys:
        """Where the trigrams of each context begin, [contexts + 1]."""
        heads = self.triples >> WORD_BITS
        return np.flatnonzero(np.concatenate([[True], heads[1:] != heads[:-1], [True]]))

    def save(self, path: Path) -> None:
        """Writes a .npz file whose bytes depend on the model alone."""
        with path.open("wb") as file:
            np.savez(file, **{one.name: getattr(self, one.name) for one in fields(self)})

    @classmethod
    def load(cls, path: Path) -> NgramModel:
        """Reads what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{one.name: stored[one.name] for one in fields(cls)})


@njit(cache=True, nogil=True)
def _interpolated(words, place, unigram, pair, context, triple):  # type: ignore[no-untyped-def]  # pragma: no cover
    """``NgramModel.probabilities`` of word numbers at ``place`` in their documents; tables with what they hold."""
    (pairs, pair_share, pair_left), (contexts, context_left, first), (triples, triple_share) = pair, context, triple
    result, bits = np.empty(len(words)), np.uint64(WORD_BITS)
    for i in range(len(words)):
        found = unigram[words[i]]
        if place[i] >= 1:
            at = place_of(pairs, words[i - 1] << bits | words[i])
            found = (pair_share[at] if at >= 0 else 0.0) + pair_left[words[i - 1]] * found
        if place[i] >= 2:
            before = words[i - 2] << bits | words[i - 1]
            known = place_of(contexts, before)
            if known >= 0:  # else there is no trigram either
                at, end = first[known], first[known + 1]
                at += np.searchsorted(triples[at:end], before << bits | words[i])
                share = triple_share[at] if at < end and triples[at] == before << bits | words[i] else 0.0
                found = share + context_left[known] * found
        result[i] = found
    return result


def _places(lengths: Sequence[int]) -> Keys:
    """Place of every word within its document, from 0."""
    sizes = np.asarray(lengths, np.int64)
    return np.arange(int(sizes.sum()), dtype=np.int64) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _keys(words: Keys, place: Keys, order: int) -> Keys:
    """Keys of the ``order`` words ending at each word that has as many before it in its document."""
    at = np.flatnonzero(place >= order - 1)
    keys = words[at]
    for back in range(1, order):
        keys = keys | words[at - back] << WORD_BITS * back
    return keys
