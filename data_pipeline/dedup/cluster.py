"""Which of the near-duplicates stay.

Documents have a rank: higher quality first, then longer, then lower id. In order of rank, a document stays unless it
has a verified edge to one that stays; then the first such one by rank is its survivor. So nothing goes for the sake
of a chain of neighbours, every removed document resembles its survivor itself, and the outcome depends on ranks and
edges alone, not on the order of either. It is the one independent set that is first by rank (Blelloch, Fineman, Shun,
2012).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

#: Raised when the same edges and ranks would give other survivors; in the audit log.
RULE = "minhash-direct/1"

Rows = npt.NDArray[np.int64]


def rank_documents(quality: npt.NDArray[np.float32], sizes: npt.NDArray[np.int64], ids: npt.NDArray[np.uint8]) -> Rows:
    """Rank [n] of each document, 0 the best, by (quality descending, bytes descending, id). ``ids`` uint8 [n, 16]."""
    assert not np.isnan(quality).any(), "quality is a number"
    halves = np.ascontiguousarray(ids).view(">u8")
    order = np.lexsort((halves[:, 1], halves[:, 0], -sizes, -quality))
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


@njit(cache=True, nogil=True)
def _survivors(better, worse, edge, survivor, via):  # type: ignore[no-untyped-def]
    """Edges sorted by (better, worse) rank. All edges into a document are seen before those out of it."""
    for e in range(better.shape[0]):
        if survivor[better[e]] < 0 and survivor[worse[e]] < 0:
            survivor[worse[e]] = better[e]
            via[worse[e]] = edge[e]


def survivors(pairs: Rows, ranks: Rows) -> tuple[Rows, Rows]:
    """``(survivor, edge)`` [n]: of each removed document its survivor and the edge between them, -1 of those that stay.

    ``pairs`` [e, 2]: verified edges between documents, in any order; ``ranks`` [n], all different where edges end.
    """
    best, rest = ranks[pairs].min(axis=1), ranks[pairs].max(axis=1)
    order = np.lexsort((rest, best))
    by_rank, via = (np.full(int(ranks.max(initial=-1)) + 1, -1, dtype=np.int64) for _ in range(2))
    _survivors(best[order], rest[order], order, by_rank, via)
    document = np.full(len(by_rank), -1, dtype=np.int64)
    ranked = np.flatnonzero(ranks >= 0)
    document[ranks[ranked]] = ranked
    survivor, edge = np.full(len(ranks), -1, dtype=np.int64), np.full(len(ranks), -1, dtype=np.int64)
    gone = np.flatnonzero(by_rank >= 0)
    survivor[document[gone]] = document[by_rank[gone]]
    edge[document[gone]] = via[gone]
    return survivor, edge
