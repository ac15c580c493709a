"""What the rules of a mask take away, measured on the records of a batch (spec section 11; never an L x L array).

``mask_entropy`` of a query row is ln(n) / ln(N): n keys that the rules (segments, roles, scopes) let it read, of the N
that causality and its document alone would, itself included, local pattern and tiers ignored. It is the largest
attention entropy that the rules permit over the largest without them: 1 = the rules cost the row nothing, 0 = the row
may read itself only. Rows with N < 2 have nothing to lose and are left out. It says nothing of the window, which is a
choice of cost; attention's own entropy is measured in ``fabric.measure``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from refractor_megatron.distinction.intervals import IntArray, Records, compile_intervals
from refractor_megatron.distinction.pattern import FULL
from refractor_megatron.distinction.rules import CompiledRules


@dataclass(frozen=True)
class MaskMeasure:
    """Of one batch. entropy, entropy_median: over query rows, None where no row has two earlier-or-equal keys;
    role_share: share of each role in the tokens, in the order of ``rules.roles``, padding left out."""

    entropy: float | None
    entropy_median: float | None
    role_share: list[float]


def measure_mask(batch: Iterable[Records], rules: CompiledRules) -> MaskMeasure:
    """Measures samples of records int [L, >= 4] = (document, segment, role, mask_bits, ...)."""
    entropy: list[npt.NDArray[np.float64]] = []
    roles = np.zeros(len(rules.roles), dtype=np.int64)
    for records in batch:
        entropy.append(row_entropy(records, rules))
        roles += np.bincount(records[records[:, 0] >= 0, 2], minlength=len(roles))
    rows = np.concatenate(entropy)
    known = len(rows) > 0
    return MaskMeasure(
        entropy=float(rows.mean()) if known else None,
        entropy_median=float(np.median(rows)) if known else None,
        role_share=(roles / max(1, roles.sum())).tolist(),
    )


def row_entropy(records: Records, rules: CompiledRules) -> npt.NDArray[np.float64]:
    """ln(n) / ln(N), float64 in [0, 1], of each row of one sample that has N >= 2 (see above)."""
    every = earlier_in_document(records[:, 0])
    rows = compile_intervals(records, rules, FULL).rows
    # Rules with ``causal: false`` add keys after the query, which causality alone would not give: not counted.
    width = np.maximum(np.minimum(rows.hi, rows.row + 1) - rows.lo, 0)
    legal = np.bincount(rows.row, weights=width, minlength=len(records))
    asked = every >= 2
    share: npt.NDArray[np.float64] = np.log(legal[asked]) / np.log(every[asked])
    return share


def earlier_in_document(document: npt.NDArray[np.integer[Any]]) -> IntArray:
    """Tokens of the same document at or before each token, itself included; 0 for padding (document < 0)."""
    order = np.argsort(document, kind="stable")
    ranked = document[order]
    first = np.searchsorted(ranked, ranked, side="left")
    count = np.empty(len(document), dtype=np.int64)
    count[order] = np.arange(len(document)) - first + 1
    count[document < 0] = 0
    return count
