"""Short pieces of documents as they were read, fit to be shown: without PII where it is replaced, none of what may not
be copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.catalogue import Catalogue
from data_pipeline.shards import Shard
from data_pipeline.sources.base import Source
from refractor_megatron.distinction.roles import RecordPolicy

#: Bytes of an excerpt of a pair that is compared, and of one that stands alone.
PAIR_BYTES, LONE_BYTES = 1500, 320
#: Text that is looked at (bytes) for where a pair begins to differ.
_LOOK_BYTES = 256 << 10
#: Equal text shown before the first difference (bytes).
_BEFORE = 240

Place = tuple[int, int]


@dataclass(frozen=True)
class Excerpts:
    """Of documents of ``catalogue``; ``scrub``: PII is replaced before anything is cut."""

    catalogue: Catalogue
    sources: Sequence[Source]
    scrub: bool

    def lone(self, place: Place) -> dict[str, Any]:
        """Where the document at (shard, row) stands, and how it begins."""
        return {**self._about(place), **_cut(self._text(place), 0, LONE_BYTES)}

    def pair(self, one: Place, other: Place) -> tuple[dict[str, Any], dict[str, Any]]:
        """Two documents from a little before where they begin to differ."""
        texts = self._text(one), self._text(other)
        start = 0 if None in texts else _start(*(text or b"" for text in texts))
        first, second = (
            {**self._about(place), **_cut(text, start, PAIR_BYTES)}
            for place, text in zip((one, other), texts, strict=True)
        )
        return first, second

    def _about(self, place: Place) -> dict[str, Any]:
        shard = self._shard(place)
        source = self.sources[int(shard.numbers("source")[place[1]])]
        file, position = (int(shard.numbers(name)[place[1]]) for name in ("file", "position"))
        return {
            "id": shard.ids[place[1]].tobytes().hex(),
            "source": source.name,
            "place": place_name(source, file, position),
            "bytes": int(shard.sizes[place[1]]),
        }

    def _text(self, place: Place) -> bytes | None:
        """The first bytes of a document; ``None`` if it may not be copied."""
        shard = self._shard(place)
        if not int(shard.numbers("policy")[place[1]]) & RecordPolicy.ALLOW_COPY:
            return None
        data = shard.text_of(place[1])[:_LOOK_BYTES]
        if self.scrub:
            from data_pipeline.filters import pii

            data, _ = pii.scrub(data)
        return data

    def _shard(self, place: Place) -> Shard:
        return Shard(self.catalogue.shards[place[0]])


class Rows:
    """Finds documents of a catalogue by id; documents of one source that are equal have the same."""

    def __init__(self, ids: npt.NDArray[np.uint8]) -> None:
        """``ids``: uint8 [n, 16]."""
        self._ids = _ordered(ids)
        self._order = np.argsort(self._ids, kind="stable")

    def __call__(self, wanted: Sequence[str]) -> npt.NDArray[np.int64]:
        """The first row of each id (hex) of ``wanted``, int64; all must be there."""
        sought = _parsed(wanted)
        found: npt.NDArray[np.int64] = self._order[np.searchsorted(self._ids, sought, sorter=self._order)]
        assert np.array_equal(self._ids[found], sought)
        return found

    def mask(self, wanted: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Which rows have an id of ``wanted``, bool [n]."""
        sought = np.sort(_parsed(wanted))
        if not len(sought):
            return np.zeros(len(self._ids), np.bool_)
        near = np.minimum(np.searchsorted(sought, self._ids), len(sought) - 1)
        return np.asarray(sought[near] == self._ids)


def place_name(source: Source, file: int, position: int) -> str:
    """``path:position`` of a document in its source, as quarantine names it."""
    path = source.files[file]["path"] if 0 <= file < len(source.files) else f"file {file}"
    return f"{path}:{position}"


def _parsed(wanted: Sequence[str]) -> npt.NDArray[Any]:
    return _ordered(np.frombuffer(bytes.fromhex("".join(wanted)), np.uint8).reshape(-1, 16))


def _ordered(ids: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """Ids [n, 16] as one value each that NumPy can sort."""
    halves = np.ascontiguousarray(ids).view(">u8").reshape(-1, 2)
    table = np.empty(len(halves), dtype=[("high", "<u8"), ("low", "<u8")])
    table["high"], table["low"] = halves[:, 0], halves[:, 1]
    return table


def _start(one: bytes, other: bytes) -> int:
    """Where excerpts begin: at the line before the first difference, or at 0 where that is near."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(np.frombuffer(one, np.uint8, size) != np.frombuffer(other, np.uint8, size))
    first = int(differ[0]) if len(differ) else size
    if first <= 2 * _BEFORE:
        return 0
    line = one.rfind(b"\n", first - 2 * _BEFORE, first - _BEFORE) + 1
    return line or first - _BEFORE


def _cut(data: bytes | None, start: int, limit: int) -> dict[str, Any]:
    if data is None:
        return {"text": None}
    text = data[start : start + limit].decode("utf-8", "ignore")
    return {"text": text, "skipped": start, "more": start + limit < len(data)}
