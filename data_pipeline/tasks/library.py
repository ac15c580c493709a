"""A bounded sample of a split's chunks as a retrieval index: where the neighbours of made tasks are looked up.

The encoder and the exact search are those of ``data_pipeline.retrieval``, so similarities do not depend on the machine.
At most ``LIMIT`` chunks are held (``LIMIT * DIM * 4`` bytes, 64 MiB); from more text they are chosen by hash.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.retrieval.build import chance, cut
from data_pipeline.retrieval.encoder import HashingEncoder, blocks_of, fit_idf
from data_pipeline.retrieval.index import RECORD, Candidates, RetrievalIndex
from data_pipeline.tasks.keyed import hashes, key_of
from data_pipeline.tasks.text import Places, Text

#: Chunks in the index, and coordinates of a vector.
LIMIT, DIM = 1 << 16, 256
#: Tokens of a chunk, and the smallest that is still worth a record.
CHUNK, SMALLEST = 128, 24
#: Chunks of a stage's sequence, so that short stages have several records too.
_PER_SEQUENCE = 10
#: Runs cut at a time; bounds memory.
_RUNS = 1 << 14


def chunk_of(length: int) -> int:
    """Tokens of a record for sequences of ``length`` tokens; 0 where they are too short for a choice of records."""
    chunk = min(CHUNK, length // _PER_SEQUENCE)
    return chunk if chunk >= SMALLEST else 0


@dataclass(frozen=True)
class Library:
    """``index`` over chunks of ``text``; ``run_start`` int64 [n]: where the run of each begins.

    The index knows texts, not documents: parts that one was cut into are no neighbours of each other. Its chunks are in
    order of (text, start).

    ``rarity`` int64 [vocabulary]: -ln of a token's frequency in the sample, in steps of 1/64. ``floor``: the similarity
    that chance alone reaches. ``chunks``: all chunks of the text, of which the index is a sample.
    """

    text: Text
    index: RetrievalIndex
    run_start: Places
    rarity: Places
    floor: float
    chunks: int

    def __len__(self) -> int:
        return len(self.run_start)

    def search(self, rows: Places, k: int) -> Candidates:
        """The ``k`` nearest chunks of other texts for each of the index's own chunks ``rows``."""
        return self.index.search(np.asarray(self.index.vectors[rows]), k, self.index.documents[rows])


def build_library(text: Text, chunk: int, vocab_size: int, seed: int, limit: int = LIMIT) -> Library:
    """The index of at most ``limit`` chunks of ``chunk`` tokens."""
    starts, lengths, run, total = _sample(text, chunk, key_of(seed, "library"), limit)
    tokens = text.data.tokens
    counts = np.zeros(vocab_size, dtype=np.int64)
    for block in blocks_of(tokens, starts, lengths, chunk):
        counts += np.bincount(block[block >= 0], minlength=vocab_size)
    encoder = HashingEncoder(DIM, fit_idf(blocks_of(tokens, starts, lengths, chunk)))
    whole = text.whole[text.document[run]]
    order = np.lexsort((starts, whole))
    starts, lengths, run, whole = starts[order], lengths[order], run[order], whole[order]
    vectors = np.empty((len(starts), DIM), dtype=np.float32)
    low = 0
    for block in blocks_of(tokens, starts, lengths, chunk):
        vectors[low : low + len(block)] = encoder.encode(block)
        low += len(block)
    records = np.zeros(len(starts), dtype=RECORD)
    records["start"], records["length"], records["document"] = starts, lengths, whole
    rarity = np.rint(-64 * np.log((counts + 1) / max(1, counts.sum()))).astype(np.int64)
    index = RetrievalIndex(vectors, records, encoder, chunk, (), 0, "")
    return Library(text, index, text.start[run], rarity, chance(len(starts), DIM), total)


def _sample(text: Text, chunk: int, key: int, limit: int) -> tuple[Places, Places, Places, int]:
    """(start, length, run) int64 of the chosen chunks in order of start, and the number of all chunks."""
    total = sum(len(starts) for starts, _, _ in _chunks(text, chunk))
    share = limit / max(1, total)
    # Eight standard deviations more than wanted, trimmed below.
    edge = np.uint64(min(2**64 - 1, int((limit + 8 * math.sqrt(limit)) / max(1, total) * 2**64)))
    kept: list[npt.NDArray[Any]] = [np.empty((3, 0), dtype=np.int64)]
    for block in _chunks(text, chunk):
        columns = np.stack(block)
        kept.append(columns if share >= 1 else columns[:, hashes(key, block[0]) <= edge])
    chosen = np.concatenate(kept, axis=1)
    if chosen.shape[1] > limit:
        chosen = chosen[:, np.argsort(hashes(key, chosen[0]), kind="stable")[:limit]]
    start, length, run = chosen[:, np.argsort(chosen[0], kind="stable")]
    return start, length, run, total


def _chunks(text: Text, chunk: int) -> Iterator[tuple[Places, Places, Places]]:
    """Blocks of (start, length, run) of all chunks, as the retrieval index cuts them."""
    for low in range(0, len(text.start), _RUNS):
        first, last = text.start[low : low + _RUNS], text.stop[low : low + _RUNS]
        starts, lengths = cut(first, last, chunk)
        order = np.argsort(first, kind="stable")
        run = order[np.searchsorted(first[order], starts, side="right") - 1] + low
        yield starts, lengths, run
