"""Baselines against dictionary-of-counts models written from the definitions, and as proper distributions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.errors import DataError
from refractor_megatron.evaluation import baselines
from refractor_megatron.evaluation.baselines import BigramModel, Counts, Ids, UnigramModel, measure_baselines

EOD = 0


@dataclass
class Row:
    tokens: Ids


@dataclass
class Split:
    """A split of given windows over a vocabulary of ``vocab`` ids, 2.5 bytes a token."""

    rows: list[list[int]]
    vocab: int
    bytes_per_token: float = 2.5

    def in_order(self) -> Iterator[Row]:
        return (Row(np.array(row, np.int64)) for row in self.rows)

    @property
    def token_bytes(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.ones(self.vocab, np.int32)


def _windows(vocab: int) -> st.SearchStrategy[tuple[int, list[list[int]]]]:
    def rows(length: int) -> st.SearchStrategy[list[list[int]]]:
        row = st.lists(st.integers(0, vocab - 1), min_size=length, max_size=length)
        return st.lists(row, min_size=1, max_size=6)

    return st.tuples(st.just(vocab), st.integers(2, 12).flatmap(rows))


windows = st.integers(2, 9).flatmap(_windows)


def _counted(rows: list[list[int]], vocab: int) -> Counts:
    counts = Counts(vocab)
    counts.add(np.array(rows))
    return counts


def _pairs(rows: list[list[int]]) -> Counter[tuple[int, int]]:
    return Counter(pair for row in rows for pair in zip(row, row[1:], strict=False))


def _bigram(rows: list[list[int]], vocab: int, context: int, target: int) -> float:
    pairs = _pairs(rows)
    values = Counter(pairs.values())
    discount = values[1] / (values[1] + 2 * values[2]) if values[1] and values[2] else 0.5
    lower = (sum(1 for _, w in pairs if w == target) + 1) / (len(pairs) + vocab)
    total = sum(count for (v, _), count in pairs.items() if v == context)
    if total == 0:
        return lower
    types = sum(1 for v, _ in pairs if v == context)
    return max(pairs[context, target] - discount, 0) / total + discount * types / total * lower


@given(windows)
@settings(max_examples=60)
def test_both_models_are_proper_distributions(case: tuple[int, list[list[int]]]) -> None:
    vocab, rows = case
    counts, every = _counted(rows, vocab), np.arange(vocab)
    assert np.exp(-UnigramModel(counts).nats(every)).sum() == pytest.approx(1)
    model = BigramModel(counts)
    for context in range(vocab):
        p = model.probability(np.full(vocab, context), every)
        assert p.min() > 0 and p.sum() == pytest.approx(1)


@given(windows)
@settings(max_examples=60)
def test_bigram_equals_the_definition(case: tuple[int, list[list[int]]]) -> None:
    vocab, rows = case
    contexts, targets = (grid.reshape(-1) for grid in np.meshgrid(np.arange(vocab), np.arange(vocab)))
    expected = [_bigram(rows, vocab, int(v), int(w)) for v, w in zip(contexts, targets, strict=True)]
    assert BigramModel(_counted(rows, vocab)).probability(contexts, targets) == pytest.approx(expected)


def test_scores_by_hand() -> None:
    train, heldout = [[1, 2, 1, 2, EOD, 1]], [[2, 1, 2], [2, EOD, 1]]
    result = measure_baselines(Split(train, 3), Split(heldout, 3))
    predicted = [(2, 1), (1, 2), (2, EOD), (EOD, 1)]  # a window's first token is never predicted
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)  # targets 1 2 0 1
    fitted = -(2 * math.log(3 / 8) + math.log(3 / 8) + math.log(2 / 8)) / 4  # counts 1 2 2 of five, plus one
    bigram = -sum(math.log(_bigram(train, 3, v, w)) for v, w in predicted) / 4
    assert (result["tokens"], result["train_tokens"]) == (4, 5)
    for name, nats in (("unigram", entropy), ("unigram_fitted", fitted), ("bigram", bigram)):
        assert result[name]["loss"] == pytest.approx(nats)
        assert result[name]["bits_per_byte"] == pytest.approx(nats / math.log(2) / 2.5)


@given(windows, windows)
@settings(max_examples=40)
def test_scoring_by_counts_equals_scoring_token_by_token(
    first: tuple[int, list[list[int]]], second: tuple[int, list[list[int]]]
) -> None:
    vocab = max(first[0], second[0])
    train, heldout = first[1], second[1]
    result = measure_baselines(Split(train, vocab), Split(heldout, vocab))
    predicted = [pair for row in heldout for pair in zip(row, row[1:], strict=False)]
    bigram = [-math.log(_bigram(train, vocab, v, w)) for v, w in predicted]
    assert result["bigram"]["loss"] == pytest.approx(sum(bigram) / len(predicted))
    assert result["unigram"]["loss"] <= result["unigram_fitted"]["loss"] + 1e-12


def test_counting_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    train, heldout = (Split(rng.integers(0, 20, (n, 9)).tolist(), 20) for n in (100, 10))
    whole = measure_baselines(train, heldout)
    monkeypatch.setattr(baselines, "BLOCK_TOKENS", 30)
    assert measure_baselines(train, heldout) == whole
    assert whole["train_tokens"] == 800


def test_bigram_learns_a_cycle_that_no_unigram_can() -> None:
    cycle = list(range(1, 9)) * 5
    result = measure_baselines(Split([cycle] * 9, 16), Split([cycle], 16))
    assert result["bigram"]["loss"] < 0.2 < 2.0 < result["unigram"]["loss"]


@pytest.mark.parametrize(("train", "heldout", "split"), [([], [[1, 2]], "training"), ([[1, 2]], [], "held-out")])
def test_empty_splits_are_named(train: list[list[int]], heldout: list[list[int]], split: str) -> None:
    with pytest.raises(DataError, match=f"{split} split has no token"):
        measure_baselines(Split(train, 3), Split(heldout, 3))
