"""Training documents that hold evaluation text, found by n-grams of words.

N-grams of 13 words as Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C. Two shares are taken of
each training document, and either reaching the threshold drops it:

* ``overlap``: of the document's n-grams, how many occur in evaluation text. Finds documents that mostly are such text.
* ``coverage``: of one evaluation item's distinct n-grams, how many occur in the document; the highest over all items.
  Finds a question inside a long page, of which it is a small share.

The default threshold, one half, is that of Lambert et al., "Tulu 3", 2024 (over half of an item's tokens in matching
n-grams), and stricter than the 70 % of Chowdhery et al., "PaLM", 2022, section 8. One shared n-gram alone drops nothing
unless the item has no other.

An n-gram that stands in more than ``MOST_ITEMS`` evaluation items is boilerplate (licences, menus, instructions to the
model) and counts as found nowhere; an item of nothing else has no coverage. Brown et al. leave out n-grams that match
in more than 10 training documents for the same reason; counting evaluation items needs no pass over the training text.
Words are those of ``dedup.shingles``: case, punctuation and white space do not hide a copy, characters stand for words
in scripts without spaces. An item shorter than n words is found only in a document of the same words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from numba import njit

from data_pipeline.dedup.shingles import shingle
from data_pipeline.filters.audit import AuditRow, write_audit
from data_pipeline.filters.key_table import KeyTable
from data_pipeline.shards import Shard
from data_pipeline.sources.messages import conversation
from data_pipeline.sources.strict_json import parse_json
from refractor_megatron.errors import DataError

#: Name and version of the rule for audit rows.
RULE: Final = "evaluation-overlap/1"
#: An n-gram in more evaluation items than this is boilerplate.
MOST_ITEMS: Final = 10
#: Files of evaluation text that can be read.
SUFFIXES: Final = (".jsonl", ".txt")

_ARRAYS = "evaluation.npz"
_NAMES = "items.json"
_BATCH = 4 << 20  # evaluation text hashed together (bytes)
_ROWS = 1024  # training documents hashed together

Bytes = npt.NDArray[np.uint8]
Shares = npt.NDArray[np.float32]
#: Name of an evaluation item, as file:line or a document's id, and its text.
Item = tuple[str, bytes]


@dataclass(frozen=True)
class Found:
    """Of training documents [n]: ``overlap`` and ``coverage`` in 0..1, and ``item``, the place of the evaluation item
    that is covered most (of equals the first, with the most n-grams; -1 for none)."""

    overlap: Shares
    coverage: Shares
    item: npt.NDArray[np.int32]

    @property
    def score(self) -> Shares:
        """The higher of both shares, float32 [n]."""
        return np.maximum(self.overlap, self.coverage)


@dataclass(frozen=True)
class EvaluationSet:
    """N-grams of evaluation items: ``hashes`` uint64 sorted and distinct; item numbers of hash i are
    ``items[starts[i]:starts[i + 1]]``; ``sizes`` int64 [items] distinct n-grams of each that count; ``names`` of the
    items."""

    ngram: int
    names: tuple[str, ...]
    hashes: npt.NDArray[np.uint64]
    starts: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int64]

    @cached_property
    def table(self) -> KeyTable:
        """Finds n-grams in ``hashes``."""
        return KeyTable(self.hashes)

    @classmethod
    def build(cls, texts: Iterable[Item], ngram: int = 13, most_items: int = MOST_ITEMS) -> EvaluationSet:
        """From named texts; blank ones are left out. Items are numbered by name: the order of ``texts`` changes
        nothing."""
        names: list[str] = []
        hashes, items = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        for batch in _batches(texts):
            flat, offsets = _joined([text for _, text in batch])
            found, starts = shingle(flat, offsets, ngram)
            number = np.repeat(np.arange(len(batch)), np.diff(starts))
            order = np.lexsort((number, found))
            found, number = found[order], number[order]
            new = np.ones(len(found), np.bool_)
            new[1:] = (found[1:] != found[:-1]) | (number[1:] != number[:-1])
            hashes.append(found[new])
            items.append((number[new] + len(names)).astype(np.int32))
            names += [name for name, _ in batch]
        every, owner = np.concatenate(hashes), np.concatenate(items)
        by_name = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
        owner = np.argsort(by_name).astype(np.int32)[owner]
        names.sort()
        order = np.lexsort((owner, every))
        every, owner = every[order], owner[order]
        distinct, counts = np.unique(every, return_counts=True)
        common = np.repeat(counts > most_items, counts)
        distinct, counts = distinct[counts <= most_items], counts[counts <= most_items]
        owner = owner[~common]
        sizes = np.bincount(owner, minlength=len(names)).astype(np.int64)
        return cls(ngram, tuple(names), distinct, np.append(0, np.cumsum(counts)).astype(np.int64), owner, sizes)

    def save(self, folder: Path) -> None:
        """Writes two files into ``folder``; their bytes depend on the set alone."""
        with (folder / _ARRAYS).open("wb") as file:
            np.savez(file, ngram=self.ngram, hashes=self.hashes, starts=self.starts, items=self.items, sizes=self.sizes)
        (folder / _NAMES).write_text(json.dumps(self.names) + "\n")

    @classmethod
    def load(cls, folder: Path) -> EvaluationSet:
        """Reads what ``save`` wrote."""
        names = tuple(json.loads((folder / _NAMES).read_text()))
        with np.load(folder / _ARRAYS, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ("hashes", "starts", "items", "sizes")}
            return cls(int(stored["ngram"]), names, **arrays)


def _batches(texts: Iterable[Item]) -> Iterator[list[Item]]:
    held: list[Item] = []
    size = 0
    for name, text in texts:
        if text.strip():
            held.append((name, text))
            size += len(text)
        if size >= _BATCH:
            yield held
            held, size = [], 0
    if held:
        yield held


def _joined(texts: list[bytes]) -> tuple[Bytes, npt.NDArray[np.int64]]:
    flat = np.frombuffer(b"".join(texts), np.uint8)
    return flat, np.append(0, np.cumsum([len(text) for text in texts])).astype(np.int64)


def overlap(flat: Bytes, offsets: npt.NDArray[np.int64], evaluation: EvaluationSet) -> Shares:
    """Share of each document's n-grams that occur in evaluation text, float32 [n]."""
    return search(flat, offsets, evaluation).overlap


def search(
    flat: Bytes, offsets: npt.NDArray[np.int64], evaluation: EvaluationSet, rows: npt.NDArray[np.int64] | None = None
) -> Found:
    """Both shares of each document flat[offsets[i]:offsets[i + 1]]; 0 for a blank one, or one not in ``rows``."""
    count = len(offsets) - 1
    found = Found(np.zeros(count, np.float32), np.zeros(count, np.float32), np.full(count, -1, np.int32))
    if not len(evaluation.hashes):
        return found
    rows = np.arange(count) if rows is None else rows
    for low in range(0, len(rows), _ROWS):
        batch = rows[low : low + _ROWS]
        grams, starts = shingle(flat, offsets, evaluation.ngram, batch)
        found.overlap[batch], found.coverage[batch], found.item[batch] = _shares(
            evaluation.table.find(grams), starts, evaluation.starts, evaluation.items, evaluation.sizes
        )
    return found


@njit(cache=True, nogil=True)
def _shares(places, bounds, starts, items, sizes):  # type: ignore[no-untyped-def]  # pragma: no cover (compiled)
    """(overlap, coverage, item) of documents whose n-grams have ``places[bounds[i]:bounds[i + 1]]`` in an evaluation
    set, -1 for those not in it; ``starts``, ``items`` and ``sizes`` are the set's."""
    count = len(bounds) - 1
    overlap, coverage, item = np.zeros(count), np.zeros(count), np.full(count, -1)
    last = np.full(len(starts) - 1, -1)  # the last document that held each n-gram
    hits = np.zeros(len(sizes), np.int64)  # distinct n-grams of each item in this document
    touched = np.empty(len(sizes), np.int64)
    for row in range(count):
        held = many = 0
        for place in places[bounds[row] : bounds[row + 1]]:
            if place < 0:
                continue
            held += 1
            if last[place] == row:
                continue
            last[place] = row
            for one in items[starts[place] : starts[place + 1]]:
                if hits[one] == 0:
                    touched[many] = one
                    many += 1
                hits[one] += 1
        overlap[row] = held / (bounds[row + 1] - bounds[row])
        most = 0
        for one in touched[:many]:
            share = hits[one] / sizes[one]
            better = hits[one] > most or (hits[one] == most and one < item[row])
            if share > coverage[row] or (share == coverage[row] and better):
                coverage[row], most, item[row] = share, hits[one], one
        hits[touched[:many]] = 0
    return overlap, coverage, item


def file_items(path: Path) -> Iterator[Item]:
    """Evaluation items of a file: a line of .jsonl (field ``text`` or ``messages``), a paragraph of .txt.

    Raises ``DataError`` naming file and line.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is neither .jsonl nor .txt; convert the evaluation texts to one of them.")
    try:
        with path.open("rb") as file:
            yield from _lines(path, file) if path.suffix == ".jsonl" else _paragraphs(path, file)
    except OSError as error:
        raise DataError(f"Cannot read the evaluation file {path} ({error.strerror}); correct its path.") from error


def _lines(path: Path, file: Iterable[bytes]) -> Iterator[Item]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = parse_json(line)
        except ValueError as error:
            raise DataError(f"{where}: no valid JSON ({error}); correct this line.") from error
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            yield f"{path.name}:{number}", value["text"].encode(errors="surrogatepass")
        elif isinstance(value, dict) and "messages" in value:
            parts = conversation(value["messages"], where).parts
            yield f"{path.name}:{number}", b"".join(part.data for part in parts)
        else:
            raise DataError(
                f"{where}: needs a field text (a string) or messages; rename the field or leave the line out."
            )


def _paragraphs(path: Path, file: Iterable[bytes]) -> Iterator[Item]:
    held: list[bytes] = []
    first = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            first = number if not held else first
            held.append(line)
        elif held:
            yield f"{path.name}:{first}", b"".join(held)
            held = []
    if held:
        yield f"{path.name}:{first}", b"".join(held)


def evaluation_task(params: dict[str, Any], index: int, out: Path) -> None:
    """Stage task, one: the ``EvaluationSet`` of held-out documents and files of the user's.

    ``params``: "shards" (paths), "heldout" (.npy masks bool [n] of each), "files" (paths, with "files_sha256" beside
    them for the digest), "ngram". Memory: 12 bytes for each n-gram of evaluation text, about 2 for each byte, thrice
    while sorting.
    """
    EvaluationSet.build(_items(params), params["ngram"]).save(out)


def _items(params: dict[str, Any]) -> Iterator[Item]:
    for path in params["files"]:
        yield from file_items(Path(path))
    for path, mask in zip(params["shards"], params["heldout"], strict=True):
        shard = Shard(Path(path))
        ids = shard.ids
        for row in np.flatnonzero(np.load(mask)).tolist():
            yield ids[row].tobytes().hex(), shard.text_of(row)


def decontaminate_task(params: dict[str, Any], index: int, out: Path) -> None:
    """Stage task, one a shard: ``overlap.parquet`` (columns overlap, coverage float32, item int32; row by row,
    0 where ``train`` is not), ``keep.npy`` (bool [n]: true where ``train`` is and the score below "threshold"),
    ``audit.parquet``.

    ``params``: "shards", "train" (.npy masks bool [n] of each), "evaluation" (folder of ``evaluation_task``),
    "threshold".
    """
    shard = Shard(Path(params["shards"][index]))
    train = np.load(params["train"][index])
    evaluation = EvaluationSet.load(Path(params["evaluation"]))
    found = search(*shard.text, evaluation, np.flatnonzero(train))
    drop = train & (found.item >= 0) & (found.score >= np.float32(params["threshold"]))
    table = pa.table({"overlap": found.overlap, "coverage": found.coverage, "item": found.item})
    pq.write_table(table, out / "overlap.parquet", compression="zstd")
    np.save(out / "keep.npy", train & ~drop)
    write_audit(out / "audit.parquet", _audit_rows(shard, np.flatnonzero(drop), found, evaluation, params["threshold"]))


def _audit_rows(
    shard: Shard, rows: npt.NDArray[np.int64], found: Found, evaluation: EvaluationSet, threshold: float
) -> Iterator[AuditRow]:
    ids, sources = shard.ids, shard.numbers("source")
    for row in rows.tolist():
        yield AuditRow(
            id=ids[row].tobytes().hex(),
            source=int(sources[row]),
            action="drop",
            filter="decontaminate",
            score=float(found.score[row]),
            threshold=threshold,
            rule=RULE,
            detail=f"{found.coverage[row]:.3f} of evaluation item {evaluation.names[found.item[row]]},"
            f" {found.overlap[row]:.3f} of the document",
        )
