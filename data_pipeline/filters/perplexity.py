"""Perplexity of documents under a model of their own language that is trained in the build.

For each language a sample of documents, drawn by a hash of seed and document id, trains two models, each on the
documents of one fold; a document's fold is the parity of its id. A document is scored by the model of the other fold,
which has not seen it. Perplexities of two languages do not compare: ``decide`` takes percentiles within one (Wenzek
et al., "CCNet", 2020).
Copies of a document in the other fold still flatter it, so perplexity means more on a corpus with few of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.filters.ngram import Hashes, NgramModel, word_hashes
from data_pipeline.hashing import MASK64, STEP, mix
from data_pipeline.shards import Shard

#: Of a document longer than both together, this much of its start and of its middle is scored (bytes).
HEAD_BYTES: Final = 4096
MIDDLE_BYTES: Final = 2048
#: Fewer words have no perplexity worth the name.
LEAST_WORDS: Final = 10
#: A fold needs this many words for a model; else its language has none and its documents no perplexity.
LEAST_TRAINING_WORDS: Final = 5000
#: One document gives at most this much to the sample (bytes), so that a book is not the model.
DOCUMENT_BYTES: Final = 64 << 10
#: Text of both folds of a language (bytes). At most ``MOST_SAMPLE_BYTES``: word numbers have 21 bits.
SAMPLE_BYTES: Final = 4 << 20
MOST_SAMPLE_BYTES: Final = 8 << 20

_REPORT = "languages.json"
_BATCH = 256  # documents scored together
_UNKNOWN = ("und", "zxx")

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Documents:
    """Where the documents of the build lie, and their languages: some 20 bytes for each."""

    codes: list[str]
    language: npt.NDArray[np.int32]  # place in ``codes``
    shard: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    rank: npt.NDArray[np.uint64]  # order of drawing
    fold: npt.NDArray[np.uint8]
    taken: npt.NDArray[np.int64]  # bytes it would give to the sample


def folds(ids: Bytes) -> Bytes:
    """Fold of each document, uint8 [n]: the parity of its id, uint8 [n, 16]."""
    return ids[:, 15] & np.uint8(1)


def languages_of(path: Path) -> list[str]:
    """Column ``language`` of a shard's signals."""
    column = pq.read_table(path, columns=["language"]).column("language")
    languages: list[str] = column.cast(pa.string()).to_pylist()
    return languages


def train_task(params: dict[str, Any], index: int, out: Path) -> None:
    """Stage task, one for all languages: models ``<language>-<fold>.npz`` and what they were trained on.

    ``params``: "shards" and "signals" (paths, in the same order), "seed", "sample_bytes" (at most
    ``MOST_SAMPLE_BYTES``). One language's sample is in memory at a time. The order of the shards changes nothing.
    """
    assert 0 < params["sample_bytes"] <= MOST_SAMPLE_BYTES
    documents = _gathered(params)
    report: dict[str, list[dict[str, int]]] = {}
    for place, code in sorted(enumerate(documents.codes), key=lambda item: item[1]):
        if code in _UNKNOWN:
            continue
        samples = [_sample(documents, place, fold, params["sample_bytes"] // 2) for fold in (0, 1)]
        words = [_words_of(params["shards"], documents, sample) for sample in samples]
        if min(sum(map(len, one)) for one in words) < LEAST_TRAINING_WORDS:
            continue
        report[code] = []
        for fold, one in enumerate(words):
            model = NgramModel.train(one)
            model.save(out / f"{code}-{fold}.npz")
            total = sum(map(len, one))
            report[code].append({"documents": len(one), "words": total, "vocabulary": len(model.vocabulary)})
    (out / _REPORT).write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


def score_task(params: dict[str, Any], index: int, out: Path) -> None:
    """Stage task, one a shard: ``perplexity.parquet`` with column "perplexity", float32, row by row; NaN where there is
    none.

    ``params``: "shards", "signals" (paths), "models" (the folder that ``train_task`` wrote).
    """
    shard = Shard(Path(params["shards"][index]))
    languages = languages_of(Path(params["signals"][index]))
    values = scores(shard, languages, Path(params["models"]))
    table = pa.table({"perplexity": pa.array(values, pa.float32())})
    pq.write_table(table, out / "perplexity.parquet", compression="zstd")


def scores(shard: Shard, languages: Sequence[str], models: Path) -> npt.NDArray[np.float32]:
    """Perplexity for each word of a shard's documents, float32 [n]; NaN without a model or with too few words."""
    assert len(languages) == len(shard)
    trained = json.loads((models / _REPORT).read_text())
    flat, offsets = shard.text
    fold_of = folds(shard.ids)
    values = np.full(len(shard), np.nan, np.float32)
    labels = np.array(languages, dtype=object)
    for code in sorted(set(languages) & set(trained)):
        for fold in (0, 1):
            rows = np.flatnonzero((labels == code) & (fold_of == fold))
            if not len(rows):
                continue
            model = NgramModel.load(models / f"{code}-{1 - fold}.npz")
            for start in range(0, len(rows), _BATCH):
                _score(model, flat, offsets, rows[start : start + _BATCH], values)
    return values


def _score(
    model: NgramModel,
    flat: Bytes,
    offsets: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    values: npt.NDArray[np.float32],
) -> None:
    """Sets ``values`` of ``rows`` with enough words. Start and middle are two texts: no n-gram spans both."""
    texts, owners = [], []
    for row in rows.tolist():
        pieces = [word_hashes(piece) for piece in slices(flat[offsets[row] : offsets[row + 1]])]
        if sum(map(len, pieces)) >= LEAST_WORDS:
            texts += [piece for piece in pieces if len(piece)]
            owners += [row] * sum(len(piece) > 0 for piece in pieces)
    if texts:
        logs = np.log(model.probabilities(texts))
        lengths = np.array([len(text) for text in texts])
        scored, first = np.unique(owners, return_index=True)
        ends = np.cumsum(lengths)
        sums = np.add.reduceat(logs, (ends - lengths)[first])
        words = np.add.reduceat(lengths, first)
        values[scored] = np.exp(-sums / words)


def slices(text: Bytes) -> list[Bytes]:
    """What is scored of a document, uint8 [bytes]: all of it, or ``HEAD_BYTES`` and the middle ``MIDDLE_BYTES``."""
    if len(text) <= HEAD_BYTES + MIDDLE_BYTES:
        return [text]
    start = max(HEAD_BYTES, (len(text) - MIDDLE_BYTES) // 2)
    return [_whole_words(text[:HEAD_BYTES], False), _whole_words(text[start : start + MIDDLE_BYTES], True)]


def _whole_words(text: Bytes, cut_start: bool) -> Bytes:
    """``text`` without the half word at its cut end, and start, if there is white space near; else without half
    characters."""
    blank = np.flatnonzero(text <= 0x20)
    border = (text & 0xC0) != 0x80  # no continuation byte
    first, last = 0, len(text)
    if cut_start:
        near = len(blank) > 0 and blank[0] < 64
        first = int(blank[0]) if near else int(np.argmax(border))
    if len(blank) and blank[-1] >= len(text) - 64:
        last = int(blank[-1])
    elif border.any():
        last = len(text) - 1 - int(np.argmax(border[::-1]))
    return text[first : max(first, last)]


def _gathered(params: dict[str, Any]) -> _Documents:
    """All documents, from ids, sizes and signals; texts are not read."""
    codes: dict[str, int] = {}
    columns: list[list[npt.NDArray[Any]]] = []
    for number, (path, signals) in enumerate(zip(params["shards"], params["signals"], strict=True)):
        shard = Shard(Path(path))
        languages = languages_of(Path(signals))
        assert len(languages) == len(shard)
        ids = np.ascontiguousarray(shard.ids)
        columns.append(
            [
                np.array([codes.setdefault(one, len(codes)) for one in languages], np.int32),
                np.full(len(shard), number, np.int32),
                np.arange(len(shard), dtype=np.int32),
                _rank(ids, params["seed"]),
                folds(ids).copy(),
                np.minimum(shard.sizes, DOCUMENT_BYTES),
            ]
        )
    joined = [np.concatenate(parts) for parts in zip(*columns, strict=True)] if columns else [np.empty(0, np.int64)] * 6
    return _Documents(list(codes), *joined)


def _rank(ids: Bytes, seed: int) -> npt.NDArray[np.uint64]:
    """Order in which documents are drawn: their id's first 64 bits, mixed with the seed (SplitMix64's finaliser)."""
    mixed = ids.view("<u8")[:, 0] ^ np.uint64((seed * STEP) & MASK64)
    return mix(mixed)


def _sample(documents: _Documents, language: int, fold: int, limit: int) -> npt.NDArray[np.int64]:
    """Places of the documents of a fold that train its model: in order of rank while they fit ``limit`` bytes."""
    mine = np.flatnonzero((documents.language == language) & (documents.fold == fold))
    drawn = mine[np.argsort(documents.rank[mine], kind="stable")]
    return drawn[np.cumsum(documents.taken[drawn]) <= limit]


def _words_of(shards: Sequence[str], documents: _Documents, chosen: npt.NDArray[np.int64]) -> list[Hashes]:
    """Word hashes of the start of each chosen document."""
    words: list[Hashes] = []
    for number in np.unique(documents.shard[chosen]).tolist():
        flat, offsets = Shard(Path(shards[number])).text
        for place in chosen[documents.shard[chosen] == number].tolist():
            start = int(offsets[documents.row[place]])
            hashes = word_hashes(flat[start : start + int(documents.taken[place])])
            if len(hashes):
                words.append(hashes)
    return words
