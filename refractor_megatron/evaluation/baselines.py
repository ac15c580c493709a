"""Count-based language models of the same tokens: what a transformer must beat before its loss means anything.

With c(w) and c(v, w) the counts of tokens and of neighbouring pairs in the training split, V the vocabulary, T(v) the
number of distinct successors of v and T'(w) of distinct predecessors of w:

* **unigram**: the entropy of the held-out tokens under their own frequencies. No context-free model can do better,
  whatever it was trained on: the strictest unigram there is (it has seen the answers);
* **unigram_fitted** on the training split: p(w) = (c(w) + 1) / (Σc + V);
* **bigram** fitted on the training split, interpolated Kneser-Ney:
  p(w | v) = max(c(v, w) - D, 0) / c(v) + D·T(v) / c(v) · q(w), with q(w) = (T'(w) + 1) / (ΣT' + V),
  q alone where v was never followed by anything, and D = n1 / (n1 + 2·n2) from the numbers of pairs seen once and
  twice (Ney, Essen and Kneser 1994). Both fitted models give every token of the vocabulary a positive probability.

All tokens of a window are predicted except its first, exactly those that the transformer is evaluated on. Documents are
separated by the end-of-document token, so a document's first token has that token as its context: no text is used
across a boundary. Bits per byte are nats per token / ln 2 / (mean bytes per token), as for the transformer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

Ids = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]

#: Tokens counted at once; bounds memory at about 0.3 GB plus the distinct pairs.
BLOCK_TOKENS = 1 << 22
#: Discount where no pair was seen exactly once or none twice, for example in tiny corpora.
_DEFAULT_DISCOUNT = 0.5


class Window(Protocol):
    """One evaluation window."""

    @property
    def tokens(self) -> Ids:
        """Ids [seq_len + 1]; all but the first are predicted."""


class Windows(Protocol):
    """What is asked of a split; `data_pipeline.stream.SampleStream` is one."""

    def in_order(self) -> Iterator[Window]:
        """All windows, each once, all of one length."""

    @property
    def token_bytes(self) -> NDArray[np.int32]:
        """Byte length of each id of the vocabulary."""

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text per token of the split."""


class Counts:
    """Token counts [V] and sparse pair counts of a stream of windows."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.tokens = np.zeros(vocab_size, np.int64)
        #: Sorted keys v * V + w of the pairs (v, w) seen, and how often each was.
        self.keys = np.empty(0, np.int64)
        self.pairs = np.empty(0, np.int64)

    def add(self, rows: Ids) -> None:
        """Count the predicted tokens of windows [n, seq_len + 1] and the pairs they form with the token before."""
        contexts, targets = _split(rows)
        self.tokens += np.bincount(targets, minlength=self.vocab_size)
        keys, pairs = np.unique(contexts.astype(np.int64) * self.vocab_size + targets, return_counts=True)
        self.keys, self.pairs = _merge(np.concatenate([self.keys, keys]), np.concatenate([self.pairs, pairs]))


class UnigramModel:
    """Add-one smoothed token frequencies."""

    def __init__(self, counts: Counts) -> None:
        smoothed = counts.tokens + 1.0
        self._log_p: Floats = np.log(smoothed / smoothed.sum())

    def nats(self, targets: Ids) -> Floats:
        """Code length of each target, in nats; same shape as ``targets``."""
        return -self._log_p[targets]


class BigramModel:
    """Interpolated Kneser-Ney bigram over sparse pair counts."""

    def __init__(self, counts: Counts) -> None:
        assert len(counts.keys), "a bigram model needs at least one pair"
        self._counts = counts
        self._discount = _discount(counts.pairs)
        vocab = counts.vocab_size
        contexts, successors = np.divmod(counts.keys, vocab)
        totals = np.bincount(contexts, weights=counts.pairs, minlength=vocab)
        self._totals: Floats = np.maximum(totals, 1.0)
        types = np.bincount(contexts, minlength=vocab)
        # Probability that the discount frees for the lower order; all of it for a context without successors.
        self._freed: Floats = np.where(totals > 0, self._discount * types / self._totals, 1.0)
        predecessors = np.bincount(successors, minlength=vocab) + 1.0
        self._lower: Floats = predecessors / predecessors.sum()

    def probability(self, contexts: Ids, targets: Ids) -> Floats:
        """p(target | context) for two arrays of one shape."""
        keys = contexts.astype(np.int64) * self._counts.vocab_size + targets
        at = np.minimum(np.searchsorted(self._counts.keys, keys), len(self._counts.keys) - 1)
        count = np.where(self._counts.keys[at] == keys, self._counts.pairs[at], 0)
        seen = np.maximum(count - self._discount, 0.0) / self._totals[contexts]
        result: Floats = seen + self._freed[contexts] * self._lower[targets]
        return result

    def nats(self, contexts: Ids, targets: Ids) -> Floats:
        """Code length of each target given the token before it, in nats."""
        return -np.log(self.probability(contexts, targets))


def measure_baselines(train: Windows, heldout: Windows) -> dict[str, Any]:
    """Fit on all windows of ``train`` and score those of ``heldout``; about one second per five million tokens.

    Returns the content of a run's ``baselines.json``: ``unigram``, ``unigram_fitted`` and ``bigram`` with ``loss``
    (nats per token), ``bits_per_byte`` and ``meaning``; ``tokens`` scored and ``train_tokens`` counted. Raises
    `DataError` where a split has no token to predict.
    """
    vocab = len(heldout.token_bytes)
    fitted = _count(train, vocab)
    own = _count(heldout, vocab)
    for split, counts in (("training", fitted), ("held-out", own)):
        if not len(counts.keys):
            raise DataError(f"the {split} split has no token to predict: bring more text")
    share = own.tokens[own.tokens > 0] / own.tokens.sum()
    # Every held-out token is scored through its count: the sums run over distinct tokens and distinct pairs.
    every = np.arange(vocab)
    unigram = math.fsum(UnigramModel(fitted).nats(every) * own.tokens)
    contexts, targets = np.divmod(own.keys, vocab)
    bigram = math.fsum(BigramModel(fitted).nats(contexts, targets) * own.pairs)
    total = int(own.tokens.sum())

    def score(loss: float, meaning: str) -> dict[str, Any]:
        return {"loss": loss, "bits_per_byte": loss / math.log(2) / heldout.bytes_per_token, "meaning": meaning}

    return {
        "unigram": score(-math.fsum(share * np.log(share)), "entropy of the held-out tokens, their own frequencies"),
        "unigram_fitted": score(unigram / total, "add-one unigram fitted on the training split"),
        "bigram": score(bigram / total, "interpolated Kneser-Ney bigram fitted on the training split"),
        "tokens": total,
        "train_tokens": int(fitted.tokens.sum()),
    }


def _count(windows: Windows, vocab_size: int) -> Counts:
    counts = Counts(vocab_size)
    for rows in _blocks(window.tokens for window in windows.in_order()):
        counts.add(rows)
    return counts


def _blocks(rows: Iterable[Ids]) -> Iterator[Ids]:
    """Stack windows into arrays [n, seq_len + 1] of about `BLOCK_TOKENS` tokens."""
    rows = iter(rows)
    for first in rows:
        yield np.stack([first, *itertools.islice(rows, BLOCK_TOKENS // max(1, len(first)))])


def _split(rows: Ids) -> tuple[Ids, Ids]:
    return rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1)


def _merge(keys: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], np.add.reduceat(counts, first) if len(first) else counts


def _discount(pairs: NDArray[np.int64]) -> float:
    once, twice = int((pairs == 1).sum()), int((pairs == 2).sum())
    return once / (once + 2 * twice) if once and twice else _DEFAULT_DISCOUNT
