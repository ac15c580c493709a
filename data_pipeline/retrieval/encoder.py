"""The hashing encoder: a chunk of token ids to a unit vector, without a model and without a vocabulary.

Features are the chunk's token unigrams and bigrams, hashed into ``BUCKETS`` buckets; each weighs
(1 + ln tf) · (1 + ln((1 + N) / (1 + df))), with tf its count in the chunk and df the number of the N fitted chunks that
hold it. The weights are projected to ``dim`` coordinates by signed feature hashing (Weinberger et al. 2009), which
keeps inner products in expectation with a standard error of about 1/sqrt(dim), and the result is scaled to length one.

Bit for bit the same on every machine: weights are integers (in steps of 1/``_STEPS``), so sums are exact in any order;
the square root and the division are correctly rounded by IEEE 754; and coordinates are rounded to multiples of
1/``GRID``, so that every product and partial sum of an inner product of two vectors is exact in float32. Similarities
then depend neither on the BLAS, nor on its threads, nor on how many queries are multiplied at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.hashing import STEP, mix

Chunks = npt.NDArray[np.int32]

#: Token of a chunk's unused places, which stand at its end.
PAD = -1
#: Buckets of hashed n-grams.
BUCKETS = 1 << 20
#: Coordinates are multiples of 1/GRID. Partial sums of inner products stay below (1 + dim**.5 / 2 / GRID)**2 < 4 by
#: Cauchy and Schwarz, in steps of 1/GRID**2 = 2**-22: they fit the 24 bits of a float32.
GRID = 2048
#: Longest chunk for which the sums are exact.
LONGEST = 8192
#: Weights are multiples of 1/_STEPS.
_STEPS = 64
#: Chunks encoded at once; bounds memory.
_BLOCK = 4096


class HashingEncoder:
    """Encodes chunks with a fitted table of document frequencies."""

    def __init__(self, dim: int, idf: npt.NDArray[np.int32]) -> None:
        """``idf``: int32 [BUCKETS] of ``fit_idf``; ``dim``: coordinates of a vector."""
        assert dim >= 1 and idf.shape == (BUCKETS,) and idf.max() < 1 << 11
        self.dim, self.idf = dim, idf
        bits = mix(np.arange(BUCKETS, dtype=np.uint64) + np.uint64(0x5EED) + np.uint64(STEP))
        self._place: npt.NDArray[np.int64] = ((bits >> np.uint64(8)) % np.uint64(dim)).astype(np.int64)
        self._signed = np.where(bits & np.uint64(1), idf, -idf)

    def encode(self, chunks: Chunks) -> npt.NDArray[np.float32]:
        """Vectors float32 [n, dim] of chunks int32 [n, chunk], padded at the end with ``PAD``.

        Each has length one, within the rounding to multiples of 1/GRID; a chunk of padding alone has length zero.
        """
        out = np.empty((len(chunks), self.dim), dtype=np.float32)
        for low in range(0, len(chunks), _BLOCK):
            out[low : low + _BLOCK] = self._encode(chunks[low : low + _BLOCK])
        return out

    def _encode(self, chunks: Chunks) -> npt.NDArray[np.float32]:
        assert chunks.shape[1] <= LONGEST
        row, bucket, count = features(chunks)
        weight = _frequency_weights(2 * chunks.shape[1])[count] * self._signed[bucket]
        cells = row * self.dim + self._place[bucket]
        # Exact: a chunk's weights sum to less than LONGEST * 2 * _STEPS * 2**11 = 2**31, their squares to 2**62.
        sums = np.bincount(cells, weights=weight, minlength=len(chunks) * self.dim).astype(np.int64)
        sums = sums.reshape(len(chunks), self.dim)
        norms = np.sqrt((sums * sums).sum(axis=1).astype(np.float64))
        unit = sums / np.maximum(norms, 1.0)[:, None]
        vectors: npt.NDArray[np.float32] = (np.rint(unit * GRID) / GRID).astype(np.float32)
        return vectors


def fit_idf(blocks: Iterable[Chunks]) -> npt.NDArray[np.int32]:
    """Inverse document frequencies int32 [BUCKETS], in steps of 1/_STEPS, of all chunks of all blocks."""
    frequency = np.zeros(BUCKETS, dtype=np.int64)
    total = 0
    for chunks in blocks:
        _, bucket, _ = features(chunks)
        frequency += np.bincount(bucket, minlength=BUCKETS)
        total += len(chunks)
    idf: npt.NDArray[np.int32] = np.rint(_STEPS * (1.0 + np.log((1.0 + total) / (1.0 + frequency)))).astype(np.int32)
    return idf


def features(chunks: Chunks) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(row, bucket, count) of the distinct n-grams of each chunk, in order of row and bucket."""
    used = chunks != PAD
    tokens = chunks.astype(np.uint64)  # padding wraps, and is masked below
    single = mix(tokens * np.uint64(2) + np.uint64(STEP))
    double = mix(single[:, :-1] + np.uint64(2) * tokens[:, 1:] + np.uint64(STEP + 1))
    grams = np.concatenate([single, double], axis=1) % np.uint64(BUCKETS)
    grams[~np.concatenate([used, used[:, 1:]], axis=1)] = BUCKETS  # padding stands last, so a pair's second decides
    ordered = np.sort(grams.astype(np.int32), axis=1)
    fresh = np.ones(ordered.shape, dtype=np.bool_)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.flatnonzero(fresh)
    count = np.diff(first, append=ordered.size)
    bucket = ordered.reshape(-1)[first].astype(np.int64)
    row = first // max(1, ordered.shape[1])
    real = bucket < BUCKETS
    return row[real], bucket[real], count[real]


def blocks_of(
    tokens: npt.NDArray[np.integer[Any]], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], chunk: int
) -> Iterator[Chunks]:
    """Chunks int32 [<= _BLOCK, chunk] cut from ``tokens`` at ``starts`` [n] with ``lengths`` [n] <= chunk, padded."""
    offsets = np.arange(chunk)
    for low in range(0, len(starts), _BLOCK):
        first, size = starts[low : low + _BLOCK, None], lengths[low : low + _BLOCK, None]
        inside = offsets < size
        yield np.where(inside, tokens[np.where(inside, first + offsets, first)].astype(np.int32), np.int32(PAD))


def _frequency_weights(longest: int) -> npt.NDArray[np.int64]:
    """1 + ln tf for tf = 0..longest (0 unused), in steps of 1/_STEPS."""
    return np.array([0] + [round(_STEPS * (1.0 + math.log(tf))) for tf in range(1, longest + 1)], dtype=np.int64)
