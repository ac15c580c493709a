"""MinHash signatures (Broder, 1997), bit for bit those of datasketch 2's scheme ``affine32``.

Of every shingle's 64-bit hash the upper half is mixed by MurmurHash3's 32-bit finaliser to h; hash k of a signature
is the least a_k * h + b_k modulo 2^32 over the document's shingles, with a_k odd. Two signatures agree in a place
with probability about equal to the Jaccard index of the sets.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit, uint32, uint64

from data_pipeline.dedup.shingles import shingle

SCHEME = "affine32"


# A product of two uint32 is a uint64 to numba, so each is cut back; ``min`` over a row becomes vector code.
@njit(inline="always")
def _premix(shingle_hash):  # type: ignore[no-untyped-def]
    h = uint32(shingle_hash >> uint64(32))
    h = uint32(h ^ (h >> uint32(16)))
    h = uint32(h * uint32(0x85EBCA6B))
    h = uint32(h ^ (h >> uint32(13)))
    h = uint32(h * uint32(0xC2B2AE35))
    return uint32(h ^ (h >> uint32(16)))


@njit(cache=True, nogil=True)
def _minhash(hashes, starts, a, b, out):  # type: ignore[no-untyped-def]
    """Four shingles at a time, so that a row is read and written a quarter as often; past the end the last repeats."""
    places = a.shape[0]
    for document in range(starts.shape[0] - 1):
        least = out[document]
        least[:] = uint32(0xFFFFFFFF)
        last = starts[document + 1] - 1
        for i in range(starts[document], last + 1, 4):
            h0, h1 = _premix(hashes[i]), _premix(hashes[min(i + 1, last)])
            h2, h3 = _premix(hashes[min(i + 2, last)]), _premix(hashes[min(i + 3, last)])
            for k in range(places):
                one = min(uint32(uint32(a[k] * h0) + b[k]), uint32(uint32(a[k] * h1) + b[k]))
                other = min(uint32(uint32(a[k] * h2) + b[k]), uint32(uint32(a[k] * h3) + b[k]))
                least[k] = min(least[k], min(one, other))


class Signer:
    """Makes signatures of ``num_hashes`` places; equal seeds make comparable ones."""

    def __init__(self, num_hashes: int = 128, seed: int = 1, ngram: int = 5) -> None:
        assert num_hashes >= 1 and ngram >= 1
        self.num_hashes, self.seed, self.ngram = num_hashes, seed, ngram
        draw = np.random.RandomState(seed)  # datasketch's generator, whose stream NumPy has frozen
        self.a = draw.randint(0, 1 << 31, num_hashes, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
        self.b = draw.randint(0, 1 << 32, num_hashes, dtype=np.uint32)

    def sign_shingles(self, hashes: npt.NDArray[np.uint64], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        """Signatures uint32 [documents, num_hashes] of what ``shingle`` returned."""
        out = np.empty((len(starts) - 1, self.num_hashes), dtype=np.uint32)
        _minhash(hashes, starts, self.a, self.b, out)
        return out

    def sign(self, flat: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        """Signatures uint32 [documents, num_hashes] of documents flat[offsets[i]:offsets[i + 1]]."""
        return self.sign_shingles(*shingle(flat, offsets, self.ngram))
