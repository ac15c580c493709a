"""Shingles equal those of slow Python; signatures equal datasketch's bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dedup.minhash import Signer
from data_pipeline.dedup.shingles import shingle
from tests.unit.data_pipeline.dedup.naive import flatten, naive_shingles

MIXED = st.text(
    st.sampled_from("aAbZ09_ .,-\n\u00a0éÉßςΣЖжİ\u0301สวไທ漢字かカ。、\u3005한국ＡﾊＦ😀\U00020000\u2028\u064b٫"),
    max_size=80,
)
TEXTS = st.one_of(st.text(max_size=60), MIXED)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(TEXTS.map(str.encode), st.binary(max_size=40)), max_size=5), st.integers(1, 6))
def test_shingles_equal_slow_python(documents: list[bytes], ngram: int) -> None:
    hashes, starts = shingle(*flatten(documents), ngram)
    found = [hashes[starts[i] : starts[i + 1]].tolist() for i in range(len(documents))]
    assert found == [naive_shingles(document, ngram) for document in documents]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(TEXTS.map(str.encode), min_size=1, max_size=4), st.sampled_from([1, 8, 13, 128]), st.integers(0, 2**32 - 1)
)
def test_signatures_equal_datasketch(documents: list[bytes], num_hashes: int, seed: int) -> None:
    datasketch = pytest.importorskip("datasketch", minversion="2.0")
    flat, offsets = flatten(documents)
    signatures = Signer(num_hashes, seed, ngram=2).sign(flat, offsets)
    hashes, starts = shingle(flat, offsets, 2)
    for i in range(len(documents)):
        sketch = datasketch.MinHash(num_hashes, seed=seed, scheme="affine32", hashfunc=lambda one: int(one) >> 32)
        sketch.update_batch(hashes[starts[i] : starts[i + 1]].tolist())
        assert signatures.dtype == np.uint32 and np.array_equal(signatures[i], sketch.hashvalues)


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXTS.map(str.encode), min_size=1, max_size=6))
def test_a_signature_depends_on_its_document_alone(documents: list[bytes]) -> None:
    signer = Signer(16, 3, ngram=2)
    together = signer.sign(*flatten(documents))
    alone = np.concatenate([signer.sign(*flatten([document])) for document in documents])
    assert np.array_equal(together, alone)


def test_signatures_estimate_jaccard() -> None:
    """Over 400 hashes the estimate is within four standard errors of the truth, at several overlaps."""
    words = [f"w{i}" for i in range(2000)]
    for shared in (0, 300, 900, 1000):
        one, other = words[:1000], [*words[1000 - shared : 1000], *words[1000 : 2000 - shared]]
        truth = shared / (2000 - shared)
        first, second = Signer(400, 7, ngram=1).sign(*flatten([" ".join(one).encode(), " ".join(other).encode()]))
        error = 4 * (truth * (1 - truth) / 400) ** 0.5
        assert abs(float((first == second).mean()) - truth) <= error + 1e-12
