"""Precision of retrieval on labelled queries (spec sections 7.3 and 14)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Precision:
    """Counts over queries. ``value`` divides by the records returned, not by k: a stricter guard may raise it."""

    hits: int  # returned records that are relevant
    returned: int
    answered: int  # queries with at least one record
    queries: int

    @property
    def value(self) -> float:
        """Share of the returned records that are relevant; not a number where none was returned."""
        return self.hits / self.returned if self.returned else float("nan")


def precision_at_k(ids: npt.NDArray[np.integer[Any]], relevant: Sequence[Collection[int]]) -> Precision:
    """Counts for ``ids`` [Q, k] (-1 for none) against the relevant records of each query."""
    hits = sum(int(np.isin(row[row >= 0], list(good)).sum()) for row, good in zip(ids, relevant, strict=True))
    returned = ids >= 0
    return Precision(hits, int(returned.sum()), int(returned.any(axis=1).sum()), len(ids))
