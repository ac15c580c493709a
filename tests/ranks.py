"""Several ranks inside one process: a thread and a gloo group each, a few milliseconds to start."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def in_threads(size: int, function: Callable[[Any], T]) -> list[T]:
    """``function(group)`` of every rank; the group is unknown to torch's default world, so pass it to every call."""
    store = dist.HashStore()
    gloo = dist.ProcessGroup.BackendType.GLOO

    def one(rank: int) -> T:
        group = dist.ProcessGroup(store, rank, size)
        group._set_default_backend(gloo)
        backend = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=20))
        group._register_backend(torch.device("cpu"), gloo, backend)
        return function(group)

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(one, rank) for rank in range(size)]]
