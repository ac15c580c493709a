"""The language model against a twin made of dictionaries, and as a probability distribution."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.filters.ngram import Hashes, NgramModel

_DOCUMENTS = st.lists(st.lists(st.integers(1, 9), max_size=25), min_size=1, max_size=8).filter(
    lambda texts: any(len(text) > 2 for text in texts)
)
_OTHERS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=8), min_size=1, max_size=3)


def _hashed(texts: list[list[int]]) -> list[Hashes]:
    """Words spread over 64 bits, in no order."""
    return [np.array(text, np.uint64) * np.uint64(0x9E3779B97F4A7C15) for text in texts]


class Twin:
    """Interpolated modified Kneser-Ney straight from Chen and Goodman's definition."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.vocabulary = {word for text in texts for word in text}
        triples = Counter(tuple(text[i : i + 3]) for text in texts for i in range(len(text) - 2))
        before_pair, before_word = defaultdict(set), defaultdict(set)
        for first, second, third in triples:
            before_pair[second, third].add(first)
        for text in texts:
            for first, second in zip(text, text[1:], strict=False):
                before_word[second].add(first)
        self.counts: list[dict[tuple[int, ...], int]] = [
            {(word,): len(seen) for word, seen in before_word.items()},
            {pair: len(seen) for pair, seen in before_pair.items()},
            dict(triples),
        ]
        self.taken = [self._discounts(counts) for counts in self.counts]

    @staticmethod
    def _discounts(counts: dict[tuple[int, ...], int]) -> list[float]:
        n = Counter(counts.values())
        if all(n[k] for k in (1, 2, 3, 4)):
            y = n[1] / (n[1] + 2 * n[2])
            found = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
            if all(0 < one < k for k, one in enumerate(found, 1)):
                return [0.0, *found]
        return [0.0, 0.5, 1.0, 1.5]

    def probability(self, history: tuple[int, ...], word: int) -> float:
        order = len(history)
        lower = self.probability(history[1:], word) if order else 1 / (len(self.vocabulary) + 1)
        counts, taken = self.counts[order], self.taken[order]
        followers = [count for gram, count in counts.items() if gram[:-1] == history]
        if not followers:
            return lower
        total, own = sum(followers), counts.get((*history, word), 0)
        left = sum(taken[min(count, 3)] for count in followers)
        return (own - taken[min(own, 3)] + left * lower) / total


@settings(max_examples=150, deadline=None)
@given(_DOCUMENTS, _OTHERS)
def test_probabilities_are_those_of_the_twin(texts: list[list[int]], others: list[list[int]]) -> None:
    model, twin = NgramModel.train([one for one in _hashed(texts) if len(one)]), Twin(texts)
    scored = others + [text for text in texts if text]
    expected = [twin.probability(tuple(text[max(0, i - 2) : i]), text[i]) for text in scored for i in range(len(text))]
    np.testing.assert_allclose(model.probabilities(_hashed(scored)), expected, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(_DOCUMENTS, st.lists(st.integers(1, 12), max_size=2))
def test_probabilities_of_all_words_and_the_unknown_one_sum_to_one(texts: list[list[int]], history: list[int]) -> None:
    model = NgramModel.train(_hashed(texts))
    known = sorted({word for text in texts for word in text})
    assert len(model.vocabulary) == len(known)
    found = model.probabilities(_hashed([[*history, word] for word in [*known, 99]]))
    last = found.reshape(len(known) + 1, -1)[:, -1]
    assert (last > 0).all()
    np.testing.assert_allclose(last.sum(), 1.0, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(_DOCUMENTS)
def test_order_of_documents_changes_nothing(texts: list[list[int]]) -> None:
    model = NgramModel.train(_hashed(texts))
    again = NgramModel.train(_hashed(texts[::-1]))
    for name in NgramModel.__dataclass_fields__:
        assert np.array_equal(getattr(model, name), getattr(again, name)), name
