"""Small retrieval indexes made by hand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipeline.provenance import FOREVER
from data_pipeline.retrieval.encoder import BUCKETS, PAD, HashingEncoder, fit_idf
from data_pipeline.retrieval.index import RECORD, RetrievalIndex
from refractor_megatron.distinction.roles import RecordPolicy

NOW = 1_700_000_000


def index_of(vectors: Any, sources: Sequence[str] = ("web",), chunk: int = 4, **columns: Any) -> RetrievalIndex:
    """An index of ``vectors`` [N, dim], one document each, fresh and trusted; ``columns`` of ``RECORD`` override."""
    vectors = np.asarray(vectors, dtype=np.float32)
    records = np.zeros(len(vectors), dtype=RECORD)
    defaults = {
        "document": np.arange(len(vectors)),
        "timestamp": NOW,
        "trust": 1.0,
        "policy": RecordPolicy.ALLOW_COPY,
        "ttl_s": FOREVER,
    }
    for name, values in (defaults | columns).items():
        records[name] = values
    return RetrievalIndex(vectors, records, _flat_encoder(vectors.shape[1]), chunk, tuple(sources), NOW, "digest")


@functools.cache
def _flat_encoder(dim: int) -> HashingEncoder:
    return HashingEncoder(dim, np.ones(BUCKETS, dtype=np.int32))


def encoded_index(chunks: Any, dim: int, **columns: Any) -> RetrievalIndex:
    """An index of token chunks [N, chunk], with vectors of an encoder fitted to them."""
    chunks = np.asarray(chunks, dtype=np.int32)
    assert PAD not in chunks
    encoder = HashingEncoder(dim, fit_idf([chunks]))
    plain = index_of(encoder.encode(chunks), chunk=chunks.shape[1], **columns)
    return RetrievalIndex(plain.vectors, plain.records, encoder, plain.chunk, plain.sources, plain.as_of, plain.digest)
