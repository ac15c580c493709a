"""Several ranks inside one process: a thread and a gloo group each, a few milliseconds to start."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
#: Groups by the number of ranks. A group has a thread that wakes up a hundred times a second for as long as it lives,
#: and one that autograd has seen lives until the next full garbage collection, which a large process rarely makes.
_groups: dict[int, list[Any]] = {}


def in_threads(size: int, function: Callable[[Any], T]) -> list[T]:
    """``function(group)`` of every rank; the group is unknown to torch's default world, so pass it to every call."""
    with ThreadPoolExecutor(size) as pool:
        groups = _groups.pop(size, None) or _made(size, pool)
        results = [future.result() for future in [pool.submit(function, group) for group in groups]]
    _groups[size] = groups  # not after a failure, which may leave messages behind
    return results


def _made(size: int, pool: ThreadPoolExecutor) -> list[Any]:
    store = dist.HashStore()
    gloo = dist.ProcessGroup.BackendType.GLOO

    def one(rank: int) -> Any:
        group = dist.ProcessGroup(store, rank, size)
        group._set_default_backend(gloo)
        backend = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=20))
        group._register_backend(torch.device("cpu"), gloo, backend)
        return group

    return [future.result() for future in [pool.submit(one, rank) for rank in range(size)]]
