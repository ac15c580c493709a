"""How much of the made tasks each stage needs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_pipeline.curriculum.routing import MOST_DRAWN
from data_pipeline.options import Curriculum, Tasks


def budgets(lengths: npt.NDArray[np.int64], curriculum: Curriculum, tasks: Tasks) -> dict[int, tuple[int, int]]:
    """Tokens of (retrieval, long-range) tasks that each stage needs, by its length, so that none is read much more
    often than the text. ``lengths``: tokens of each training document.

    A stage's text is what only it holds whole, and the short text that is mixed in; longer stages draw first.
    """
    edges = np.array(curriculum.lengths, dtype=np.int64) + 1
    stage = np.minimum(np.searchsorted(edges, lengths), len(edges) - 1)
    total = np.bincount(stage, weights=lengths.astype(np.float64), minlength=len(edges))
    for number in range(len(edges) - 1, 0, -1):
        shorter = total[:number].sum()
        drawn = min(total[number] * curriculum.short_share / (1 - curriculum.short_share), MOST_DRAWN * shorter)
        total[:number] *= 1 - drawn / max(shorter, 1.0)
        total[number] += drawn
    rest = 1 - tasks.retrieval - tasks.long_range
    return {
        int(length): (int(tokens * tasks.retrieval / rest), int(tokens * tasks.long_range / rest))
        for length, tokens in zip(curriculum.lengths, total, strict=True)
    }
