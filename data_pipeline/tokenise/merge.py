"""Encoded shards to one indexed dataset: documents gathered in a given order into ``.bin``, ``.idx`` and ``.rec``."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.output import mendable_errors
from data_pipeline.pack.indexed import IndexedWriter, token_dtype
from data_pipeline.pack.records import RecordWriter
from data_pipeline.tokenise.stages import DOCUMENTS, SPAN_COUNTS, SPANS, TOKENS

#: Bytes gathered before they are written; one document of more is a block of its own.
BLOCK_BYTES = 16 << 20
#: Files kept open at a time.
_OPEN_FILES = 256


@dataclass(frozen=True)
class Merged:
    """What was written; ``sha256``: of the ``.bin``."""

    documents: int
    tokens: int
    spans: int
    sha256: str


def merge(
    task_folders: Sequence[Path], order: npt.NDArray[np.int64], prefix: Path, vocab_size: int, block: int = BLOCK_BYTES
) -> Merged:
    """Writes the documents ``order``, int64 [m, 2] = (shard, row), of ``encode_task`` folders to ``<prefix>.*``.

    Holds ``block`` bytes of text at a time, and eight bytes a document. Raises ``OutputError`` if the disk is full.
    """
    order = np.asarray(order, dtype=np.int64).reshape(-1, 2)
    with mendable_errors(prefix.parent):
        writer = IndexedWriter(prefix, vocab_size)
        try:
            tokens = _Column(task_folders, TOKENS, DOCUMENTS, np.dtype(token_dtype(vocab_size)).itemsize)
            for data, lengths in tokens.blocks(order, block):
                writer.add_many(data.view(token_dtype(vocab_size)), lengths)
        except BaseException:
            writer.abandon()
            raise
        digest = writer.close()
        with RecordWriter(prefix) as records:
            spans = _Column(task_folders, SPANS, SPAN_COUNTS, 16)
            for data, lengths in spans.blocks(order, block):
                records.add_many(data.view(np.int32).reshape(-1, 4), lengths)
            return Merged(len(order), writer.tokens, records.close(), digest)


class _Column:
    """Rows of unequal length over the files of all task folders, read at random."""

    def __init__(self, folders: Sequence[Path], name: str, counts: str, width: int) -> None:
        """``counts``: file of the number of items in each row; ``width``: bytes of an item."""
        self._paths = [folder / name for folder in folders]
        self._width = width
        self._starts = [_starts(np.load(folder / counts)) for folder in folders]
        self._open: OrderedDict[int, int] = OrderedDict()
        for path, starts in zip(self._paths, self._starts, strict=True):
            assert path.stat().st_size == int(starts[-1]) * width, f"{path} is not of the length its rows have"

    def blocks(
        self, order: npt.NDArray[np.int64], block: int
    ) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
        """``(data, lengths)`` of consecutive stretches of ``order``: bytes back to back, items of each row.

        ``data`` is overwritten by the next block.
        """
        begin, end = self._bounds(order)
        lengths = end - begin
        reach = np.cumsum(lengths * self._width)
        buffer = np.empty(0, dtype=np.uint8)
        first = 0
        try:
            while first < len(order):
                done = int(reach[first - 1]) if first else 0
                stop = max(first + 1, int(np.searchsorted(reach, done + block, side="right")))
                size = int(reach[stop - 1]) - done
                if size > len(buffer):
                    buffer = np.empty(max(size, block), dtype=np.uint8)
                self._gather(order[first:stop], begin[first:stop], end[first:stop], buffer.data[:size])
                yield buffer[:size], lengths[first:stop]
                first = stop
        finally:
            while self._open:
                os.close(self._open.popitem()[1])

    def _bounds(self, order: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """First item of each ordered row in its file, and the one after its last."""
        begin, end = np.empty(len(order), dtype=np.int64), np.empty(len(order), dtype=np.int64)
        by_shard = np.argsort(order[:, 0], kind="stable")
        cuts = np.searchsorted(order[by_shard, 0], np.arange(len(self._starts) + 1))
        for shard, starts in enumerate(self._starts):
            here = by_shard[cuts[shard] : cuts[shard + 1]]
            rows = order[here, 1]
            begin[here], end[here] = starts[rows], starts[rows + 1]
        return begin, end

    def _gather(self, order: npt.NDArray[Any], begin: npt.NDArray[Any], end: npt.NDArray[Any], out: memoryview) -> None:
        """Fills ``out``; neighbours in the order that are neighbours in their file are one read."""
        apart = (order[1:, 0] != order[:-1, 0]) | (begin[1:] != end[:-1])
        heads = np.concatenate([[0], np.flatnonzero(apart) + 1])
        tails = np.concatenate([heads[1:], [len(order)]]) - 1
        filled = 0
        for shard, start, stop in zip(
            order[heads, 0].tolist(),
            (begin[heads] * self._width).tolist(),
            (end[tails] * self._width).tolist(),
            strict=True,
        ):
            handle = self._file(shard)
            while start < stop:  # the kernel may give less than asked
                got = os.preadv(handle, [out[filled : filled + stop - start]], start)
                assert got, f"{self._paths[shard]} was cut short while it was read"
                start, filled = start + got, filled + got

    def _file(self, shard: int) -> int:
        handle = self._open.get(shard)
        if handle is None:
            if len(self._open) == _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            handle = self._open[shard] = os.open(self._paths[shard], os.O_RDONLY)
        else:
            self._open.move_to_end(shard)
        return handle


def _starts(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts
