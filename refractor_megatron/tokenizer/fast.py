"""Encoding in bulk: the ids of ``Tokenizer.encode`` for many documents at once, several times faster.

The compiled path knows one split pattern, ours. Imported tokenizers with another pattern are encoded by tiktoken, one
document at a time; ``FastEncoder.compiled`` says which it is.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from refractor_megatron.tokenizer.pieces import PIECE_CHARS, SPLIT_PATTERN
from refractor_megatron.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from refractor_megatron.tokenizer.fast_kernels import Tables
    from refractor_megatron.tokenizer.fast_merge import Vocabulary

#: Entries of the piece cache (64 bytes each).
CACHE_ENTRIES = 1 << 17


class FastEncoder:
    """Encodes batches, one at a time: threads wait for each other, since the cache of pieces is written meanwhile."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tables = _tables(tokenizer) if _supported(tokenizer) else None
        self._lock = threading.Lock()
        self._scratch = np.empty((2, 4 * PIECE_CHARS if self._tables else 0), dtype=np.int32)

    @property
    def compiled(self) -> bool:
        """Whether this tokenizer takes the compiled path; ids are the same on both."""
        return self._tables is not None

    def encode_batch(
        self, data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """``(ids, starts)`` of documents ``data[offsets[i]:offsets[i + 1]]``, ``offsets`` int64 [n + 1] not falling.

        ids: int32, all documents back to back; document i is ``ids[starts[i]:starts[i + 1]]``, equal to
        ``Tokenizer.encode`` of its bytes.
        """
        assert offsets.ndim == 1 and len(offsets) and offsets[0] >= 0 and offsets[-1] <= len(data)
        assert (np.diff(offsets) >= 0).all(), "offsets do not fall"
        if self._tables is None:
            return self._encode_each(data, offsets)
        from refractor_megatron.tokenizer.fast_kernels import CACHED_IDS, encode_documents

        starts = np.zeros(len(offsets), dtype=np.int64)
        # One id a byte at most. Pages that are never written cost no memory.
        out = np.empty(int(offsets[-1] - offsets[0]) + CACHED_IDS, dtype=np.int32)
        data, offsets = np.ascontiguousarray(data), np.ascontiguousarray(offsets)
        with self._lock:
            count = encode_documents(data, offsets, self._tables, self._scratch, out, starts)
        return out[:count], starts

    def _encode_each(
        self, data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        rows = [
            np.array(self._tokenizer.encode(data[start:stop].tobytes()), dtype=np.int32)
            for start, stop in zip(offsets[:-1], offsets[1:], strict=True)
        ]
        starts = np.zeros(len(offsets), dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        return np.concatenate([np.empty(0, np.int32), *rows]), starts


def _supported(tokenizer: Tokenizer) -> bool:
    from refractor_megatron.tokenizer.fast_merge import ID_BITS

    return tokenizer.pattern == SPLIT_PATTERN and len(tokenizer.ranks) < 1 << ID_BITS


def _tables(tokenizer: Tokenizer) -> Tables:
    from refractor_megatron.tokenizer.fast_kernels import CACHED_IDS, ENTRY_WORDS, Tables, seed

    cache = np.zeros(CACHE_ENTRIES * ENTRY_WORDS, dtype=np.uint64)
    tables = Tables(_vocabulary(tokenizer.ranks), character_classes(), cache)
    seed(tables, np.zeros(CACHED_IDS, dtype=np.int32))
    return tables


def _vocabulary(ranks: tuple[bytes, ...]) -> Vocabulary:
    from refractor_megatron.tokenizer import fast_merge

    bounds = np.zeros(len(ranks) + 1, dtype=np.int64)
    np.cumsum([len(token) for token in ranks], out=bounds[1:])
    byte_id = np.empty(256, dtype=np.int32)
    for i, token in enumerate(ranks[:256]):
        byte_id[token[0]] = i
    vocabulary = fast_merge.Vocabulary(
        blob=np.frombuffer(b"".join(ranks), dtype=np.uint8),
        bounds=bounds,
        slots=np.full(_table_size(len(ranks)), -1, dtype=np.int32),
        pairs=np.empty(0, dtype=np.uint64),
        byte_id=byte_id,
        first=np.full(1 << 16, -1, dtype=np.int32),
        crossed=np.zeros(4 * _table_size(len(ranks)), dtype=np.uint8),
        maybe=np.empty(0, dtype=np.uint8),
        whole=np.ones(1, dtype=np.bool_),
    )
    fast_merge.fill_slots(vocabulary)
    fast_merge.fill_crossed(vocabulary)
    found = np.empty(fast_merge.list_pairs(vocabulary, np.empty(0, dtype=np.uint64)), dtype=np.uint64)
    fast_merge.list_pairs(vocabulary, found)
    places = _table_size(len(found))
    vocabulary = vocabulary._replace(
        pairs=np.full(places, ~np.uint64(0), dtype=np.uint64), maybe=np.zeros(places // 2, dtype=np.uint8)
    )
    fast_merge.fill_pairs(vocabulary, found)
    tokens, ranks_of = np.empty((2, max(map(len, ranks))), dtype=np.int32)
    vocabulary.whole[0] = not fast_merge.all_reached(vocabulary, tokens, ranks_of)
    return vocabulary


def _table_size(entries: int) -> int:
    """Places of an open-addressed table: a power of two, a quarter to a half full."""
    return 1 << (2 * entries + 1).bit_length()


@functools.cache
def character_classes() -> npt.NDArray[np.uint8]:
    """Class of every code point, uint8 [0x110000], as tiktoken's expression engine has them.

    Asked of the engine itself, because its version of Unicode is neither Python's nor ours to choose.
    """
    import tiktoken

    from refractor_megatron.tokenizer.fast_kernels import LETTER, LINE_END, NUMBER, SPACE

    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))  # surrogates are no characters
    single = {bytes([b]): b for b in range(256)}
    classes = np.zeros(0x110000, dtype=np.uint8)
    for pattern, kind in ((r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE), (r"[\r\n]", LINE_END)):
        engine = tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=single, special_tokens={})
        # The encoder drops what does not match, so the ids are the UTF-8 of the characters that do.
        matching = bytes(engine.encode_ordinary(every)).decode()
        classes[[ord(char) for char in matching]] = kind
    return classes
