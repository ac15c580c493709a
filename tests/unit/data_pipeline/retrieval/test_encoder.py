"""The encoder against its definition, written once more in plain Python, and against recorded values."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest

from data_pipeline.retrieval.encoder import BUCKETS, GRID, PAD, HashingEncoder, blocks_of, features, fit_idf

_WORD = (1 << 64) - 1
FLAT = np.full(BUCKETS, 64, dtype=np.int32)


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31


def grams(tokens: list[int]) -> Counter[int]:
    single = [mix(2 * token) for token in tokens]
    pairs = [mix((left + 2 * token + 1) & _WORD) for left, token in zip(single, tokens[1:], strict=False)]
    return Counter(gram % BUCKETS for gram in single + pairs)


def encoded(tokens: list[int], idf: npt.NDArray[np.int32], dim: int) -> list[float]:
    sums = [0] * dim
    for bucket, count in grams(tokens).items():
        bits = mix(bucket + 0x5EED)
        weight = round(64 * (1 + math.log(count))) * int(idf[bucket])
        sums[(bits >> 8) % dim] += weight if bits & 1 else -weight
    norm = math.sqrt(sum(one * one for one in sums))
    return [round(one / norm * GRID) / GRID for one in sums]


def chunks(n: int, chunk: int = 24, vocab: int = 50, seed: int = 0) -> npt.NDArray[np.int32]:
    """Random chunks with padding of every length from none to all but one token."""
    rng = np.random.default_rng(seed)
    out = rng.integers(0, vocab, (n, chunk)).astype(np.int32)
    for row in out:
        row[rng.integers(1, chunk + 1) :] = PAD
    return out


def test_vectors_are_the_definition() -> None:
    text = chunks(40)
    idf = fit_idf([text[:25], text[25:]])
    vectors = HashingEncoder(32, idf).encode(text)
    assert vectors.dtype == np.float32
    for row, vector in zip(text, vectors, strict=True):
        assert vector.tolist() == encoded([token for token in row.tolist() if token != PAD], idf, 32)


def test_document_frequencies_are_the_definition() -> None:
    text = chunks(30, vocab=20)
    idf = fit_idf([text[:7], text[7:]])
    holds = Counter(bucket for row in text.tolist() for bucket in grams([t for t in row if t != PAD]))
    for bucket, frequency in holds.items():
        assert idf[bucket] == round(64 * (1 + math.log(31 / (1 + frequency))))
    assert np.count_nonzero(idf == round(64 * (1 + math.log(31)))) == BUCKETS - len(holds)


def test_recorded_values() -> None:
    """The same on every machine and for ever, or indexes of one name would differ."""
    vector = HashingEncoder(8, FLAT).encode(np.array([[5, 6, 7, 5, 6, PAD]], dtype=np.int32))[0]
    assert (vector * GRID).astype(int).tolist() == [0, 0, -657, 1825, 0, 0, -657, 0]
    big = HashingEncoder(256, fit_idf([chunks(100, 128, 2048)])).encode(chunks(100, 128, 2048))
    assert hashlib.sha256(big.tobytes()).hexdigest()[:16] == "3fe0d9af10d04208"


def test_length_is_one_and_padding_alone_is_zero() -> None:
    vectors = HashingEncoder(256, FLAT).encode(chunks(50, 128, 2048))
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 256**0.5 / 2 / GRID
    assert not HashingEncoder(16, FLAT).encode(np.full((1, 5), PAD, dtype=np.int32)).any()


def test_similarity_is_exact_in_float32_in_any_order() -> None:
    vectors = HashingEncoder(256, FLAT).encode(chunks(20, 64, 300))
    exact = [[sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)) for b in vectors[:5]]
             for a in vectors]  # fmt: skip
    order = np.random.default_rng(1).permutation(256)
    shuffled = np.cumsum(vectors[:, None, order] * vectors[None, :5, order], axis=2, dtype=np.float32)[..., -1]
    for similarity in (vectors @ vectors[:5].T, (vectors[:5] @ vectors.T).T, shuffled):
        assert [[Fraction(float(x)) for x in row] for row in similarity] == exact


def test_similar_texts_are_near_and_others_far() -> None:
    rng = np.random.default_rng(3)
    text = rng.integers(0, 2000, (200, 64)).astype(np.int32)
    near = text.copy()
    near[:, ::8] = rng.integers(0, 2000, (200, 8))  # one token in eight replaced
    encoder = HashingEncoder(256, fit_idf([text]))
    similarity = encoder.encode(near) @ encoder.encode(text).T
    assert (similarity.argmax(axis=1) == np.arange(200)).all()
    assert similarity.diagonal().min() > 0.5 > np.abs(similarity - np.diag(similarity.diagonal())).max()


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_shortest_chunks(chunk: int) -> None:
    row, bucket, count = features(np.array([[4] * chunk, [4] + [PAD] * (chunk - 1)], dtype=np.int32))
    assert [dict(zip(bucket[row == r].tolist(), count[row == r].tolist(), strict=True)) for r in (0, 1)] == [
        dict(grams([4] * chunk)),
        dict(grams([4])),
    ]


def test_blocks_cut_and_pad() -> None:
    tokens = np.arange(20, dtype=np.uint16)
    (block,) = blocks_of(tokens, np.array([0, 4, 18]), np.array([4, 1, 2]), 4)
    assert block.tolist() == [[0, 1, 2, 3], [4, PAD, PAD, PAD], [18, 19, PAD, PAD]]
