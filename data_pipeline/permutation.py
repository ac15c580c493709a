"""A keyed bijection of 0..n-1 without an index array: a Feistel network over the next power of four, cycle-walked."""

from __future__ import annotations

import functools
import hashlib

from data_pipeline.hashing import mix_one

_ROUNDS = 6


class Permutation:
    """``p(i)`` for i in 0..n-1: every value once, O(1) memory, expected at most four network passes."""

    def __init__(self, n: int, key: bytes) -> None:
        assert n >= 1
        self._n = n
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        digest = hashlib.blake2b(key, digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        assert 0 <= index < self._n
        value = self._network(index)
        while value >= self._n:  # outside the range: walk the cycle until it returns, which it must
            value = self._network(value)
        return value

    def _network(self, value: int) -> int:
        left, right = value >> self._half, value & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix_one(right ^ key) & self._mask)
        return left << self._half | right


@functools.lru_cache(maxsize=1024)
def permutation(n: int, key: bytes) -> Permutation:
    """``Permutation(n, key)``, kept: neighbouring samples ask for the same few."""
    return Permutation(n, key)
