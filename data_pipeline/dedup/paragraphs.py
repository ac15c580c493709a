"""Paragraphs that stand in another document already: cut everywhere but in one place.

A paragraph ends at a blank line. Two are the same if their words between white space are, byte by byte, by a 128-bit
hash (blake2b: nobody can make two collide, and 10^10 paragraphs do so by chance with probability 10^-19). The place
with the smallest (document id, number within the document) keeps it. Conversations are never cut, and short paragraphs
stay: a heading or "Yes." repeated is no duplicate. Lists of hashes lie on disk, sorted by range, as in an external
sort.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numba import njit

from data_pipeline.engine.tasks import Executor, Stage, task_folder
from data_pipeline.filters.audit import AuditRow
from data_pipeline.progress import Log
from data_pipeline.shards import Shard

#: Name and version of the rule for audit rows.
RULE: Final = "paragraph-exact/1"
#: Shorter paragraphs are never cut (bytes, white space normalised).
LEAST_BYTES: Final = 100
#: Text for each task that compares hashes (megabytes); its lists take at most two thirds of that.
_BUCKET_MEGABYTES: Final = 256

_MODULE = "data_pipeline.dedup.paragraphs"
_SPAN = [("shard", "<u4"), ("row", "<u4"), ("start", "<i8"), ("end", "<i8")]  # start and end in bytes of the document
#: Hashes and ids are two numbers each, read from the bytes big end first, so that they sort as the bytes do.
_PLACE = np.dtype([("hash", "<u8", 2), ("id", "<u8", 2), ("number", "<u4"), *_SPAN])
_CUT = np.dtype([*_SPAN, ("owner", "<u8", 2)])

Records = npt.NDArray[Any]
#: Start and end (bytes) of what to cut from a document.
Range = tuple[int, int]


@njit(cache=True, nogil=True)
def _long_paragraphs(flat, offsets, rows, least, said, spans):  # type: ignore[no-untyped-def]  # pragma: no cover (compiled)
    """Paragraphs of at least ``least`` bytes, white space normalised, of documents ``rows``; returns how many.

    ``spans`` int64 [room, 5]: number within the document, row, start, where the next one starts (bytes of the
    document), end in ``said``, which holds what the paragraphs say back to back.
    """
    count = written = 0
    for row in rows:
        first, last = offsets[row], offsets[row + 1]
        number, start, at, begin, gap = 0, first, first, written, False
        while at <= last:
            after = at if at < last else last + 1  # behind the blank lines at ``at``
            if at < last and flat[at] == 10:
                ahead = at + 1
                while ahead < last and (flat[ahead] == 32 or 9 <= flat[ahead] <= 13):
                    ahead += 1
                    if flat[ahead - 1] == 10:
                        after = ahead
            if after > at:
                if written - begin >= least:
                    spans[count] = number, row, start - first, min(after, last) - first, written
                    count, begin = count + 1, written
                number, start, at, written, gap = number + 1, after, after, begin, False
                continue
            byte = flat[at]
            if byte == 32 or 9 <= byte <= 13:
                gap = written > begin
            else:
                if gap:
                    said[written] = 32
                    written, gap = written + 1, False
                said[written] = byte
                written += 1
            at += 1
    return count


def paragraph_duplicates(
    shards: Sequence[Path],
    keep: Sequence[Path] | None,
    executor: Executor,
    work: Path,
    log: Log,
    least: int = LEAST_BYTES,
) -> list[Path]:
    """What to cut from each shard: folders for ``read_cuts``, one for each of ``shards``.

    ``keep``: .npy files, bool [n] for each shard, of the documents that are still in the corpus; ``None`` for all. The
    cuts depend on the kept documents alone, not on how they lie in shards. Stages: list, compare, gather.
    """
    megabytes = tuple(path.stat().st_size / 1e6 for path in shards)
    masks = None if keep is None else [str(path) for path in keep]
    common = {"shards": [str(path) for path in shards], "keep": masks, "least": least}
    listed = executor.run(
        Stage("paragraph-list", f"{_MODULE}:list_task", len(shards), common, megabytes=megabytes), work, log
    )
    buckets = max(1, round(sum(megabytes) / _BUCKET_MEGABYTES + 0.5))
    compare = {"lists": _folders(listed, len(shards)), "buckets": buckets}
    compared = executor.run(Stage("paragraph-compare", f"{_MODULE}:compare_task", buckets, compare), work, log)
    gather = {"compared": _folders(compared, buckets)}
    gathered = executor.run(
        Stage("paragraph-gather", f"{_MODULE}:gather_task", len(shards), gather, megabytes=megabytes), work, log
    )
    return [task_folder(gathered, index) for index in range(len(shards))]


def _folders(stage: Path, count: int) -> list[str]:
    return [str(task_folder(stage, index)) for index in range(count)]


def list_task(params: dict[str, Any], index: int, out: Path) -> None:
    """Stage task, one a shard: ``places.npy``, its long paragraphs sorted by hash.

    ``params``: "shards", "keep" (paths or null), "least" (bytes).
    """
    shard = Shard(Path(params["shards"][index]))
    chosen = ~shard.framed
    if params["keep"] is not None:
        chosen &= np.load(params["keep"][index])
    flat, offsets = shard.text
    rows, least = np.flatnonzero(chosen), max(1, params["least"])
    size = int(shard.sizes[rows].sum())
    said, spans = np.empty(size, np.uint8), np.empty((size // least, 5), np.int64)
    spans = spans[: _long_paragraphs(flat, offsets, rows, least, said, spans)]
    numbers, rows, starts, nexts, ends = spans.T
    data, hashes = said.data, bytearray()
    for begin, end in pairwise([0, *ends.tolist()]):
        hashes += hashlib.blake2b(data[begin:end], digest_size=16).digest()
    places = np.zeros(len(spans), _PLACE)
    places["hash"] = np.frombuffer(hashes, ">u8").reshape(-1, 2)
    places["id"] = np.ascontiguousarray(shard.ids[rows]).view(">u8")
    places["number"], places["shard"], places["row"] = numbers, index, rows
    places["start"], places["end"] = starts, nexts
    np.save(out / "places.npy", places[_order(places)])


def _order(places: Records) -> npt.NDArray[np.int64]:
    """By hash, then document id and number; equal documents (which exact deduplication leaves no two of) by place."""
    keys = [places["row"], places["shard"], places["number"], places["id"][:, 1], places["id"][:, 0]]
    return np.lexsort([*keys, places["hash"][:, 1], places["hash"][:, 0]])


def compare_task(params: dict[str, Any], index: int, out: Path) -> None:
    """Stage task, one a range of hashes: ``cuts.npy``, every place but the owner of each paragraph, by shard and place.

    ``params``: "lists" (folders of ``list_task``), "buckets" (how many ranges).
    """
    low, high = (index * 2**64 // params["buckets"], (index + 1) * 2**64 // params["buckets"])
    slices = [np.zeros(0, _PLACE)]
    for folder in params["lists"]:
        places = np.load(Path(folder) / "places.npy", mmap_mode="r")
        first = np.ascontiguousarray(places["hash"][:, 0])
        start = np.searchsorted(first, np.uint64(low))
        end = len(first) if high == 2**64 else np.searchsorted(first, np.uint64(high))
        slices.append(np.array(places[start:end]))
    places = np.concatenate(slices)
    places = places[_order(places)]
    new = np.ones(len(places), np.bool_)
    new[1:] = (places["hash"][1:] != places["hash"][:-1]).any(axis=1)
    owners = np.maximum.accumulate(np.where(new, np.arange(len(places)), 0))
    cuts = np.zeros(int((~new).sum()), _CUT)
    for name in ("shard", "row", "start", "end"):
        cuts[name] = places[name][~new]
    cuts["owner"] = places["id"][owners[~new]]
    np.save(out / "cuts.npy", cuts[_by_place(cuts)])


def _by_place(cuts: Records) -> npt.NDArray[np.int64]:
    return np.lexsort([cuts["start"], cuts["row"], cuts["shard"]])


def gather_task(params: dict[str, Any], index: int, out: Path) -> None:
    """Stage task, one a shard: ``cuts.npy``, what to cut from it. ``params``: "compared" (folders of
    ``compare_task``)."""
    slices = [np.zeros(0, _CUT)]
    for folder in params["compared"]:
        cuts = np.load(Path(folder) / "cuts.npy", mmap_mode="r")
        start, end = np.searchsorted(cuts["shard"], [index, index + 1])
        slices.append(np.array(cuts[start:end]))
    mine = np.concatenate(slices)
    np.save(out / "cuts.npy", mine[_by_place(mine)])


def read_cuts(folder: Path) -> dict[int, list[Range]]:
    """Row of the shard -> ranges to cut, rising and apart; rows from which nothing is cut are not there."""
    ranges: dict[int, list[Range]] = {}
    for cut in np.load(folder / "cuts.npy"):
        ranges.setdefault(int(cut["row"]), []).append((int(cut["start"]), int(cut["end"])))
    return ranges


def cut_text(data: bytes, ranges: Sequence[Range]) -> bytes:
    """``data`` without ``ranges``. A paragraph goes with the blank lines after it; all other bytes stay as they are."""
    pieces, at = [], 0
    for start, end in ranges:
        pieces.append(data[at:start])
        at = end
    return b"".join([*pieces, data[at:]])


def audit_rows(shard: Shard, folder: Path) -> Iterator[AuditRow]:
    """A row for each document that is cut: "drop" where only white space remains. ``score``: share of its bytes cut.

    ``detail`` names the number of paragraphs and the document that keeps the first of them.
    """
    cuts = np.load(folder / "cuts.npy")
    rows, first = np.unique(cuts["row"], return_index=True)
    ends = np.append(first[1:], len(cuts)).tolist()
    ids, sources = shard.ids, shard.numbers("source")
    for row, start, end in zip(rows.tolist(), first.tolist(), ends, strict=False):  # without rows one end is left over
        mine = cuts[start:end]
        data = shard.text_of(row)
        remains = cut_text(data, [(int(one["start"]), int(one["end"])) for one in mine])
        yield AuditRow(
            id=ids[row].tobytes().hex(),
            source=int(sources[row]),
            action="change" if remains.strip() else "drop",
            filter="paragraphs",
            score=1 - len(remains) / len(data),
            threshold=None,
            rule=RULE,
            detail=f"{len(mine)} paragraphs, the first also in {mine['owner'][0].astype('>u8').tobytes().hex()}",
        )
