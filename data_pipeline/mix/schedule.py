"""Which domain a sample is from: a pure function of its index, with a lag below one sample at every index.

Sample k of a domain with share c / P may stand no earlier than its fluid schedule lets it begin, floor(k P / c), and
no later than it must have ended, ceil((k + 1) P / c). Earliest deadline first always keeps such windows when shares add
up to one (Steiner and Yeomans 1993; Tijdeman 1980 on the chairman assignment problem; Pfair scheduling, Baruah et al.
1996), so after n samples every domain has had n c / P of them, give or take less than one.
"""

from __future__ import annotations

import heapq
from collections import defaultdict

import numpy as np
import numpy.typing as npt


class Schedule:
    """Index -> (domain, how many samples of that domain came before); constant time, memory of one period."""

    def __init__(self, counts: npt.NDArray[np.int64]) -> None:
        """``counts``: samples of each domain in a period, int64 [domains], at least 0."""
        self.counts = counts
        self.period = int(counts.sum())
        self._domain = _arrange([int(count) for count in counts])
        self._before = np.empty(self.period, dtype=np.int64)
        for domain in range(len(counts)):
            here = np.flatnonzero(self._domain == domain)
            self._before[here] = np.arange(len(here))

    def __call__(self, index: int) -> tuple[int, int]:
        """(domain, samples of it before ``index``) for ``index`` >= 0."""
        assert index >= 0
        periods, slot = divmod(index, self.period)
        domain = int(self._domain[slot])
        return domain, periods * int(self.counts[domain]) + int(self._before[slot])

    def before(self, index: int) -> npt.NDArray[np.int64]:
        """Samples of each domain among the first ``index``, int64 [domains]."""
        periods, slot = divmod(index, self.period)
        return periods * self.counts + np.bincount(self._domain[:slot], minlength=len(self.counts))


def _arrange(counts: list[int]) -> npt.NDArray[np.int32]:
    """The domain of every slot of a period, by earliest deadline; ties go to the lower number."""
    period = sum(counts)
    ready: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for domain, count in enumerate(counts):
        if count:
            ready[0].append((-(-period // count), domain, 0))
    waiting: list[tuple[int, int, int]] = []
    arranged = np.empty(period, dtype=np.int32)
    for slot in range(period):
        for job in ready.pop(slot, ()):
            heapq.heappush(waiting, job)
        deadline, domain, k = heapq.heappop(waiting)
        assert slot < deadline, "earliest deadline first keeps every deadline"
        arranged[slot] = domain
        k, count = k + 1, counts[domain]
        if k < count:
            job = (-(-(k + 1) * period // count), domain, k)
            # windows of one domain may share a slot; the next sample stands behind this one all the same
            ready[max(k * period // count, slot + 1)].append(job)
    return arranged
