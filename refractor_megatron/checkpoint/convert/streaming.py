"""Read the next tensors while the last ones are written, within a bound on what is held."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
#: Items in the making: reading and writing overlap with one, and more would only hold memory.
_DEPTH = 2


@contextmanager
def own_threads() -> Iterator[None]:
    """Keep torch from using more threads than the stages of a conversion have: they fill the cores, its would wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ahead(
    items: Iterable[T], make: Callable[[T], R], size: Callable[[T], int], budget: int
) -> Generator[tuple[T, R], None, None]:
    """``(item, make(item))`` in order; ``make`` runs in another thread while earlier results are used.

    Args:
        size: bytes of an item's result, known before it is made. budget: bytes that may be held; one item always may.

    Errors of ``make`` surface where its item's turn comes.
    """
    waiting: deque[tuple[T, int, Future[R]]] = deque()
    held = 0
    with ThreadPoolExecutor(1) as pool:
        try:
            for item in items:
                own = size(item)
                while waiting and (held + own > budget or len(waiting) >= _DEPTH):
                    first, freed, future = waiting.popleft()
                    yield first, future.result()
                    del future
                    held -= freed
                waiting.append((item, own, pool.submit(make, item)))
                held += own
            while waiting:
                first, _, future = waiting.popleft()
                yield first, future.result()
                del future
        finally:
            for _, _, future in waiting:
                future.cancel()
