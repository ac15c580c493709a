"""Tier C's data under arbitrary input: search is sorting, records keep out what is scoped, and no label leaks."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.pack.records import Records
from data_pipeline.provenance import FOREVER
from data_pipeline.retrieval import index as module
from data_pipeline.retrieval.build import cut, eligible_runs
from data_pipeline.retrieval.guard import Guard
from data_pipeline.retrieval.neighbours import Neighbours
from data_pipeline.stream import Sample
from refractor_megatron.distinction.roles import ROLE_ID, MaskBit
from refractor_megatron.training.batches import stack
from tests.unit.data_pipeline.retrieval.indexes import encoded_index, index_of

CHUNK, FAN_IN, VOCABULARY = 4, 2, 12
NEIGHBOURS = Neighbours(
    encoded_index(np.random.default_rng(0).integers(0, VOCABULARY, (60, CHUNK)), 32), Guard(0.1, FOREVER, 0.0), FAN_IN
)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 20), st.sampled_from([1, 3, 100]))
def test_search_is_sorting_everything(seed: int, k: int, queries: int, block: int) -> None:
    """Ties by id, own document left out; few and many queries, blocks of one, some and all records."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 25))
    vectors = rng.integers(-2, 3, (n, 3)) / 4  # coarse, so that there are ties
    documents = np.sort(rng.integers(0, 6, n))
    index = index_of(vectors, document=documents)
    asked = (rng.integers(-2, 3, (queries, 3)) / 4).astype(np.float32)
    own = rng.integers(0, 8, queries)
    with patch.multiple(module, _RECORDS=block, _QUERIES=4, _FEW=3):
        found = index.search(asked, k, own)
        assert (index.search(asked, k).own == 0).all()
    for q in range(queries):
        similarity = (vectors @ asked[q]).tolist()
        ranked = sorted((-similarity[i], i) for i in range(n) if documents[i] != own[q])[:k]
        padding = k - len(ranked)
        assert found.ids[q].tolist() == [i for _, i in ranked] + [-1] * padding
        assert found.similarity[q].tolist() == [-s for s, _ in ranked] + [-np.inf] * padding
        own_similarity = [similarity[i] for i in range(n) if documents[i] == own[q]]
        assert found.own[q] == sum(s >= found.similarity[q, -1] for s in own_similarity)


SPANS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 5), st.sampled_from([0, 2, 4, 8, 16, 20, 24]), st.booleans()),
    min_size=1,
    max_size=12,
)


@given(SPANS, st.integers(1, 6))
def test_records_are_the_eligible_tokens(spans: list[tuple[int, int, int, bool]], chunk: int) -> None:
    """Token by token: what may be retrieved is in exactly one chunk of its document, or in a dropped last piece."""
    columns = np.array([(n, 0, role, bits) for n, role, bits, _ in spans], dtype=np.int32)
    fresh = np.array([True, *(new for *_, new in spans[1:])])
    first = np.append(np.flatnonzero(fresh), len(spans))
    starts = np.append(0, np.cumsum(columns[:, 0])).astype(np.int64)
    low, high = eligible_runs(Records(columns, starts, first))
    document = np.repeat(np.cumsum(fresh), columns[:, 0])
    bits = np.repeat(columns[:, 3], columns[:, 0])
    allowed = (np.repeat(columns[:, 2], columns[:, 0]) == ROLE_ID["data"]) | (bits & MaskBit.RET_SCOPE > 0)
    allowed &= (bits & (MaskBit.TOOL_SCOPE | MaskBit.SAFETY_SCOPE)) == 0
    inside = np.zeros(starts[-1], dtype=np.bool_)
    for a, b in zip(low, high, strict=True):
        assert not inside[a:b].any() and len(set(document[a:b])) == 1
        inside[a:b] = True
    assert np.array_equal(inside, allowed)
    begin, length = cut(low, high, chunk)
    held = np.zeros_like(inside)
    for a, n in zip(begin, length, strict=True):
        assert n <= chunk <= 4 * n and not held[a : a + n].any() and len(set(document[a : a + n])) == 1
        held[a : a + n] = True
    for a, b in zip(low, high, strict=True):
        rest = (b - a) % chunk
        assert held[a : b - rest].all() and held[b - rest : b].sum() == (rest if 4 * rest >= chunk else 0)


def made(tokens: npt.NDArray[np.int64], documents: npt.NDArray[np.int32]) -> Sample:
    records = np.zeros((len(tokens), 4), dtype=np.int32)
    records[:, 0] = documents - documents[0]
    return Sample(tokens, records, documents)


def read(sample: Sample) -> Any:
    return stack([sample], NEIGHBOURS).records[0, :, 4:].numpy()  # [s, R]


@given(st.integers(0, 2**32 - 1), st.integers(1, 17), st.data())
def test_no_token_reads_what_was_found_with_it_or_a_later_one(seed: int, length: int, data: st.DataObject) -> None:
    """Change any tokens, and documents, from the start of chunk u on, the label of the last input among them: the ids
    that chunk u and all before it read stay as they were."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, length + 1)
    documents = np.sort(rng.integers(0, 60, length + 1)).astype(np.int32)
    before = read(made(tokens, documents))
    chunks = -(-length // CHUNK)
    u = data.draw(st.integers(0, chunks))
    changed, others = tokens.copy(), documents.copy()
    changed[u * CHUNK :] = rng.integers(0, VOCABULARY, len(changed[u * CHUNK :]))
    others[u * CHUNK :] += int(rng.integers(0, 3))
    after = read(made(changed, others))
    upto = min((u + 1) * CHUNK, length)
    assert np.array_equal(before[:upto], after[:upto])
    assert (before[:CHUNK] == -1).all()
    for start in range(0, length, CHUNK):  # all tokens of a chunk read the same
        assert (before[start : start + CHUNK] == before[start]).all()


def test_the_last_token_of_a_chunk_is_asked_with() -> None:
    """The token just before a chunk is an input: were it left out, retrieval would come a token late."""
    tokens = np.arange(13) % VOCABULARY
    documents = np.full(13, 99, dtype=np.int32)
    seen = set()
    for last in range(VOCABULARY):
        changed = tokens.copy()
        changed[CHUNK - 1] = last
        seen.add(read(made(changed, documents))[CHUNK].tobytes())
    assert len(seen) > 2
