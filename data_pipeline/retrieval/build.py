"""Builds the retrieval index of a dataset's training split.

What may become a record: text that the mask rules treat as they treat a record, that is role ``data``, or text tagged
``<retrieval:context>``, and in neither case text in TOOL_SCOPE or SAFETY_SCOPE. A record carries no role and no scope
of its own, so anything else would reach readers whom the rules keep from it. Records are chunks of such text within one
document; a last piece shorter than a quarter chunk is dropped.

Metadata comes from ``provenance.npy``. What a document does not state: its source is the corpus folder or package that
it was read from, its trust is 1, it may be copied and may not reach tools, it never expires, and its age is 0. Ages
count from the index's own present, ``as_of``: the newest timestamp of any record, or 0 where none has one. So the guard
answers the same on every day that a run is repeated.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline import manifest as manifests
from data_pipeline.output import draft_folder, exclusive, mendable_errors
from data_pipeline.pack.indexed import Indexed, read_indexed
from data_pipeline.pack.records import Records, read_records
from data_pipeline.progress import Log
from data_pipeline.provenance import UNDATED, read_provenance
from data_pipeline.retrieval.encoder import BUCKETS, GRID, LONGEST, HashingEncoder, blocks_of, fit_idf
from data_pipeline.retrieval.index import INDEX, RECORD, RetrievalIndex
from refractor_megatron.distinction.roles import RETRIEVED_ROLE, ROLE_ID, MaskBit
from refractor_megatron.errors import DataError

#: Raise when the same dataset and settings would give other bytes.
CODE_VERSION = 1
_TAIL = 4  # a last piece counts from 1/_TAIL of a chunk


def build_index(folder: Path, chunk: int, dim: int, log: Log = print) -> tuple[Path, RetrievalIndex]:
    """The index of the dataset in ``folder``, verified; builds it in ``folder/retrieval-<digest>`` if it is missing.

    Args:
        chunk: tokens of a record, at most.
        dim: coordinates of a vector.

    Raises ``DataError`` for a dataset without usable text or a damaged index, ``OutputError`` if it cannot be written.
    """
    if chunk > LONGEST:
        raise DataError(f"relation.retrieval.chunk={chunk} is more than an index can hold; set {LONGEST} or less.")
    dataset = manifests.load(folder)
    table = read_provenance(folder, dataset["splits"]["train"]["documents"])
    key = {
        "code_version": CODE_VERSION,
        "data": dataset["content_sha256"],
        "provenance": hashlib.sha256(table.tobytes()).hexdigest(),
        "sources": dataset["provenance_sources"],
        "chunk": chunk,
        "dim": dim,
        "encoder": {"buckets": BUCKETS, "grid": GRID},
    }
    target = folder / f"retrieval-{hashlib.sha256(manifests.canonical(key)).hexdigest()[:12]}"
    with mendable_errors(folder):
        if not (target / "manifest.json").exists():
            with exclusive(folder, log):
                if not (target / "manifest.json").exists():  # by the build this one has waited for
                    with draft_folder(target) as draft:
                        _build_into(draft, folder, table, key, log)
    manifests.verify(target, manifests.load(target, INDEX))
    return target, RetrievalIndex.load(target)


def _build_into(draft: Path, folder: Path, table: npt.NDArray[Any], key: dict[str, Any], log: Log) -> None:
    data, spans = read_indexed(folder / "train"), read_records(folder / "train")
    chunk, dim = key["chunk"], key["dim"]
    starts, lengths = cut(*eligible_runs(spans), chunk)
    if not len(starts):
        raise DataError(
            f"{folder} has no text to retrieve: no training document has {-(-chunk // _TAIL)} tokens in a row of role "
            f"{RETRIEVED_ROLE} outside of scopes; lower relation.retrieval.chunk or add documents."
        )
    records = _records(starts, lengths, data, table)
    idf = fit_idf(blocks_of(data.tokens, starts, lengths, chunk))
    encoder = HashingEncoder(dim, idf)
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(starts), dim)}
    with (draft / "vectors.npy").open("wb") as out:  # no memory map: a full disk would end the process
        np.lib.format.write_array_header_1_0(out, header)
        for block in blocks_of(data.tokens, starts, lengths, chunk):
            out.write(encoder.encode(block).tobytes())
    as_of = max((int(t) for t in np.unique(records["timestamp"]) if t != UNDATED), default=0)
    records["timestamp"][records["timestamp"] == UNDATED] = as_of
    np.save(draft / "records.npy", records, allow_pickle=False)
    np.save(draft / "idf.npy", idf, allow_pickle=False)
    counts = {
        "records": len(starts),
        "documents": len(np.unique(records["document"])),
        "tokens": int(lengths.sum()),
        "tokens_left_out": int(data.starts[-1] - lengths.sum()),
    }
    log(
        f"data: retrieval index of {counts['records']} records, {counts['tokens']} of {data.starts[-1]} tokens; at "
        f"relation.retrieval.dim={dim} a similarity up to about {chance(len(starts), dim):.2f} is chance"
    )
    manifests.seal(draft, {**key, **counts, "as_of": as_of}, INDEX)


def chance(records: int, dim: int) -> float:
    """Similarity of the best of so many unrelated records: the maximum of normal variables of deviation 1/sqrt(dim)."""
    return math.sqrt(2 * math.log(max(2, records)) / dim)


def eligible_runs(spans: Records) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(start, stop) int64 [n] of the longest runs of tokens within one document that may become records."""
    role, bits = np.asarray(spans.spans[:, 2]), np.asarray(spans.spans[:, 3])
    scoped = (bits & (MaskBit.TOOL_SCOPE | MaskBit.SAFETY_SCOPE)) != 0
    eligible = ((role == ROLE_ID[RETRIEVED_ROLE]) | ((bits & MaskBit.RET_SCOPE) != 0)) & ~scoped
    document = np.searchsorted(spans.first, np.arange(len(role)), side="right")
    number = np.where(eligible, document, 0)  # documents count from 1 here
    first = np.flatnonzero(np.diff(number, prepend=-1))
    last = np.append(first[1:], len(role))
    kept = number[first] > 0
    return spans.starts[first[kept]], spans.starts[last[kept]]


def cut(
    start: npt.NDArray[np.int64], stop: npt.NDArray[np.int64], chunk: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(start, length) int64 of the chunks of the runs [start, stop), in order."""
    pieces = -(-(stop - start) // chunk)
    place = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(start, pieces) + place * chunk
    lengths = np.minimum(chunk, np.repeat(stop, pieces) - starts)
    kept = lengths * _TAIL >= chunk
    return starts[kept], lengths[kept]


def _records(
    starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], data: Indexed, table: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    records = np.empty(len(starts), dtype=RECORD)
    document = np.searchsorted(data.starts, starts, side="right") - 1
    records["start"], records["length"], records["document"] = starts, lengths, document
    for name in ("source", "timestamp", "trust", "policy", "ttl_s"):
        records[name] = table[name][document]
    return records
