"""Which documents go as duplicates, why, and in whose favour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.dedup import cluster, exact
from data_pipeline.dedup.stages import near_survivors
from data_pipeline.engine.tasks import Executor
from data_pipeline.options import Dedup
from data_pipeline.output import mendable_errors
from data_pipeline.progress import Log
from data_pipeline.shards import Shard

CLUSTERS = "dedup-clusters.parquet"
_SCHEMA = pa.schema(
    [
        ("survivor", pa.binary(16)),
        ("member", pa.binary(16)),  # removed
        ("jaccard", pa.float64()),  # of the two
        ("kind", pa.string()),  # exact, near
        ("survivor_shard", pa.int32()),
        ("survivor_row", pa.int64()),
        ("member_shard", pa.int32()),
        ("member_row", pa.int64()),
    ]
)

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Removals:
    """``removed``: a mask per shard; ``counts``: {"exact": n, "near": n}; ``by_source``: the same, per source's name;
    ``work_done``: pairs compared, edges found and rounds needed; ``clusters``: Parquet, largest cluster first."""

    removed: list[npt.NDArray[np.bool_]]
    counts: dict[str, int]
    by_source: dict[str, dict[str, int]]
    work_done: dict[str, int]
    clusters: Path
    threshold: float
    _table: _Table

    @property
    def equal(self) -> tuple[Rows, Rows]:
        """Documents [m] that went for equal content and the equal one [m] of each, as row numbers over all shards.

        Their equal may itself have gone since, as a near-duplicate.
        """
        exact_ones = self._table.twin >= 0
        return self._table.rows[exact_ones], self._table.twin[exact_ones]

    def audit(self) -> Iterator[dict[str, Any]]:
        """A row of the audit log for each removed document, in order of id."""
        table = self._table
        for place in np.lexsort(_halves(table.ids[table.rows])[::-1]):
            row, near = int(table.rows[place]), bool(table.near[place])
            survivor = table.ids[table.survivor[place]].tobytes().hex()
            twin = table.ids[table.twin[place]].tobytes().hex()
            yield {
                "id": table.ids[row].tobytes().hex(),
                "source": int(table.source[row]),
                "action": "drop",
                "filter": "near-duplicate" if near else "exact-duplicate",
                "score": float(table.jaccard[place]) if near else 1.0,
                "threshold": self.threshold if near else 1.0,
                "rule": cluster.RULE if near else exact.RULE,
                "detail": f"survivor={survivor}" + ("" if near or twin == survivor else f" same-content-as={twin}"),
            }


@dataclass(frozen=True)
class _Table:
    """Documents, then one row for each that goes: its number, its survivor's, their Jaccard index, why, its equal."""

    ids: npt.NDArray[np.uint8]  # [n, 16]
    source: npt.NDArray[np.int32]  # [n]
    bases: Rows
    rows: Rows
    survivor: Rows
    jaccard: npt.NDArray[np.float64]
    near: npt.NDArray[np.bool_]
    twin: Rows


def deduplicate(
    shards: Sequence[Path], keep: Sequence[npt.NDArray[np.bool_]], quality: Sequence[npt.NDArray[np.float32]],
    sources: Sequence[str], options: Dedup, executor: Executor, work: Path, log: Log,
) -> Removals:  # fmt: skip
    """Exact duplicates, then near ones if ``options.enabled``, among documents that ``keep`` leaves in.

    ``keep`` and ``quality`` hold a row per document of each shard; ``sources`` are the names that shards' ``source``
    counts. Every removed document's survivor stays. What goes depends on ids, texts, quality and options alone.
    """
    with mendable_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    opened = [Shard(path) for path in shards]
    assert [len(one) for one in opened] == [len(mask) for mask in keep] == [len(scores) for scores in quality]
    ids = _joined([one.ids for one in opened], np.uint8, 16)
    kept = _joined(keep, np.bool_)
    scores = np.where(kept, _joined(quality, np.float32), np.float32(0))
    ranks = cluster.rank_documents(scores, _joined([one.sizes for one in opened], np.int64), ids)
    twin = exact.exact_survivors(_joined([one.keys for one in opened], np.uint8, 16), ranks, kept)
    survivor, jaccard, is_near = twin.copy(), np.where(twin >= 0, 1.0, 0.0), np.zeros(len(ids), dtype=np.bool_)
    work_done = {"compared": 0, "edges": 0, "rounds": 0}
    if options.enabled and len(ids):
        near = near_survivors(shards, np.where(kept & (twin < 0), ranks, -1), options, executor, work, log)
        work_done = {"compared": near.compared, "edges": near.edges, "rounds": near.rounds}
        is_near = near.survivor >= 0
        survivor[is_near], jaccard[is_near] = near.survivor[is_near], near.jaccard[is_near]
        moved = np.flatnonzero((twin >= 0) & is_near[twin])  # their equal went, for a survivor they resemble as much
        survivor[moved], jaccard[moved] = near.survivor[twin[moved]], near.jaccard[twin[moved]]
    rows = np.flatnonzero(survivor >= 0)
    bases = np.concatenate([[0], np.cumsum([len(one) for one in opened])]).astype(np.int64)
    source = _joined([one.numbers("source") for one in opened], np.int32)
    table = _Table(ids, source, bases, rows, survivor[rows], jaccard[rows], is_near[rows], twin[rows])
    _write_clusters(work, table)
    counts = {"exact": int((~table.near).sum()), "near": int(table.near.sum())}
    log(f"dedup: {counts['exact']} exact and {counts['near']} near duplicates among {int(kept.sum())} documents")
    removed = [survivor[first:last] >= 0 for first, last in pairwise(bases)]
    by_source = _by_source(table, sources)
    return Removals(removed, counts, by_source, work_done, work / CLUSTERS, options.threshold, table)


@dataclass
class Cluster:
    """A survivor, how many went in its favour, and the first of them; a place is (shard, row)."""

    survivor: bytes
    place: tuple[int, int]
    size: int
    members: list[dict[str, Any]]  # id, jaccard, kind, place


def largest_clusters(path: Path, top: int, examples: int = 20) -> list[Cluster]:
    """The ``top`` clusters of most members, largest first, with at most ``examples`` members each.

    Of equal size, the one whose survivor has the lowest id comes first; members are in order of id.
    """
    found: list[Cluster] = []
    for batch in pq.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            if not found or found[-1].survivor != row["survivor"]:
                if len(found) == top:
                    return found
                found.append(Cluster(row["survivor"], (row["survivor_shard"], row["survivor_row"]), 0, []))
            one = found[-1]
            one.size += 1
            if one.size <= examples:
                place = (row["member_shard"], row["member_row"])
                one.members.append(
                    {"id": row["member"], "jaccard": row["jaccard"], "kind": row["kind"], "place": place}
                )
    return found


def _write_clusters(work: Path, table: _Table) -> None:
    sizes = np.bincount(table.survivor, minlength=1)[table.survivor]
    own, theirs = _halves(table.ids[table.rows]), _halves(table.ids[table.survivor])
    order = np.lexsort((*own[::-1], *theirs[::-1], -sizes))
    rows, survivor = table.rows[order], table.survivor[order]
    shard, survivor_shard = (np.searchsorted(table.bases, one, "right") - 1 for one in (rows, survivor))
    columns = [
        pa.array([one.tobytes() for one in table.ids[survivor]], pa.binary(16)),
        pa.array([one.tobytes() for one in table.ids[rows]], pa.binary(16)),
        pa.array(table.jaccard[order]),
        pa.array(np.where(table.near[order], "near", "exact"), pa.string()),
        pa.array(survivor_shard.astype(np.int32)),
        pa.array(survivor - table.bases[survivor_shard]),
        pa.array(shard.astype(np.int32)),
        pa.array(rows - table.bases[shard]),
    ]
    draft = work / f".{CLUSTERS}"
    with mendable_errors(work):
        pq.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA), draft)
        draft.replace(work / CLUSTERS)


def _by_source(table: _Table, sources: Sequence[str]) -> dict[str, dict[str, int]]:
    found = Counter(zip(table.source[table.rows].tolist(), table.near.tolist(), strict=True))
    return {
        name: {"exact": found[(number, False)], "near": found[(number, True)]} for number, name in enumerate(sources)
    }


def _joined(columns: Sequence[npt.NDArray[Any]], dtype: type[Any], width: int | None = None) -> npt.NDArray[Any]:
    """The shards' columns as one; of no shards, an empty one."""
    shape = (0,) if width is None else (0, width)
    return np.concatenate([np.empty(shape, dtype=dtype), *columns])


def _halves(ids: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Ids [n, 16] as two numbers, the first the more significant."""
    halves = np.ascontiguousarray(ids).view(">u8").reshape(-1, 2)
    return halves[:, 0], halves[:, 1]
