"""The encode stage: one task per shard, ids and record spans row by row, exactly as ``encode_document`` gives them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.pack.indexed import token_dtype
from data_pipeline.shards import Shard
from refractor_megatron.distinction.roles import DOCUMENT_ROLE, ROLE_ID, ROLES
from refractor_megatron.tokenizer import Tokenizer
from refractor_megatron.tokenizer.fast import FastEncoder

#: Files of a task: ids back to back (``token_dtype``); int32 [spans, 4]; int64 [rows], tokens and spans of each row.
TOKENS, SPANS, DOCUMENTS, SPAN_COUNTS = "tokens.bin", "spans.bin", "documents.npy", "span_counts.npy"


@dataclass(frozen=True)
class _Layout:
    """Parts of all documents of a shard in order, each array [parts] but the first.

    bounds: int64 [parts + 1], where each part's text begins, and the end of the last. document: row it belongs to.
    framed: bool. record: int32 [parts, 3] = (segment, role, bits).
    """

    bounds: npt.NDArray[np.int64]
    document: npt.NDArray[np.int64]
    framed: npt.NDArray[np.bool_]
    record: npt.NDArray[np.int32]


def encode_task(params: dict[str, Any], index: int, out: Path) -> None:
    """Encodes one shard into ``TOKENS``, ``SPANS``, ``DOCUMENTS`` and ``SPAN_COUNTS``.

    params: ``shards``: paths; ``tokenizer``: path of the tokenizer file.
    """
    tokenizer, encoder = _encoder(*_identity(Path(params["tokenizer"])))
    shard = Shard(Path(params["shards"][index]))
    layout = _layout(shard)
    ids, starts = encoder.encode_batch(shard.text[0], layout.bounds)
    tokens, lengths = _with_specials(tokenizer, layout, ids, starts, len(shard))
    spans, counts = _spans(layout, np.diff(starts), len(shard))
    tokens.astype(token_dtype(tokenizer.vocab_size)).tofile(out / TOKENS)
    spans.tofile(out / SPANS)
    np.save(out / DOCUMENTS, lengths)
    np.save(out / SPAN_COUNTS, counts)


def _identity(path: Path) -> tuple[Path, int, int]:
    stat = path.stat()
    return path, stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=1)
def _encoder(path: Path, changed: int, size: int) -> tuple[Tokenizer, FastEncoder]:
    """Encoder of a tokenizer file, kept between a process's tasks: its tables take longer to build than a shard."""
    tokenizer = Tokenizer.load(path)
    return tokenizer, FastEncoder(tokenizer)


def _layout(shard: Shard) -> _Layout:
    offsets, framed = shard.text[1], shard.framed
    counts = np.ones(len(shard), dtype=np.int64)
    conversations = {int(row): shard.document(int(row)).parts for row in np.flatnonzero(framed)}
    for row, parts in conversations.items():
        counts[row] = len(parts)
    first = np.zeros(len(shard) + 1, dtype=np.int64)
    np.cumsum(counts, out=first[1:])
    bounds = np.empty(first[-1] + 1, dtype=np.int64)
    bounds[first] = offsets
    record = np.tile(np.array([0, ROLE_ID[DOCUMENT_ROLE], 0], dtype=np.int32), (int(first[-1]), 1))
    for row, parts in conversations.items():
        here = slice(first[row], first[row + 1])
        bounds[here] = offsets[row] + np.cumsum([0, *(len(part.data) for part in parts[:-1])])
        record[here] = [(part.segment, part.role, part.bits) for part in parts]
    return _Layout(bounds, np.repeat(np.arange(len(shard)), counts), np.repeat(framed, counts), record)


def _with_specials(
    tokenizer: Tokenizer, layout: _Layout, ids: npt.NDArray[np.int32], starts: npt.NDArray[np.int64], rows: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Ids with role, end and end-of-document tokens put in, and the tokens of each document, int64 [rows]."""
    role_token = np.array([tokenizer.role_ids[role] for role in ROLES], dtype=np.int32)
    framed, parts = np.flatnonzero(layout.framed), len(layout.document)
    last = np.searchsorted(layout.document, np.arange(rows), side="right") - 1
    # In reading order: a part's role token, its text, its end token, and after the last part the document's end.
    turn = np.concatenate([3 * framed, 3 * framed + 1, 3 * last + 2])
    where = np.concatenate([starts[framed], starts[framed + 1], starts[last + 1]])
    what = np.concatenate(
        [
            role_token[layout.record[framed, 1]],
            np.full(len(framed), tokenizer.end, dtype=np.int32),
            np.full(rows, tokenizer.eod, dtype=np.int32),
        ]
    )
    order = np.argsort(turn)
    length = np.diff(starts) + 2 * layout.framed
    lengths = np.bincount(layout.document, weights=length, minlength=rows).astype(np.int64) if parts else length
    return np.insert(ids, where[order], what[order]), lengths + 1


def _spans(
    layout: _Layout, tokens: npt.NDArray[np.int64], rows: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Record spans int32 [k, 4] of all documents and their number in each, int64 [rows].

    A part's tokens and the end-of-document token are spans; neighbours with the same record are one.
    """
    if not rows:
        return np.empty((0, 4), dtype=np.int32), np.empty(0, dtype=np.int64)
    last = np.searchsorted(layout.document, np.arange(rows), side="right") - 1
    closing = np.zeros((rows, 3), dtype=np.int32)
    closing[:, 0], closing[:, 1] = layout.record[last, 0], ROLE_ID[DOCUMENT_ROLE]
    after = last + 1
    document = np.insert(layout.document, after, np.arange(rows))
    record = np.insert(layout.record, after, closing, axis=0)
    length = np.insert(tokens + 2 * layout.framed, after, 1)
    fresh = np.ones(len(document), dtype=np.bool_)
    fresh[1:] = (np.diff(document) != 0) | (np.diff(record, axis=0) != 0).any(axis=1)
    begin = np.flatnonzero(fresh)
    spans = np.column_stack([np.add.reduceat(length, begin), record[begin]]).astype(np.int32)
    return spans, np.bincount(document[begin], minlength=rows).astype(np.int64)
