"""Reading ahead: the order is kept, memory is bounded, errors come where their item would have come."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refractor_megatron.checkpoint.convert.streaming import ahead


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 20))
def test_order_and_budget(sizes: list[int], budget: int) -> None:
    lock = threading.Lock()
    made: list[int] = []
    used = 0

    def make(item: tuple[int, int]) -> int:
        with lock:
            made.append(item[1])
        return item[0]

    items = list(enumerate(sizes))
    for (number, size), result in ahead(items, make, lambda item: item[1], budget):
        assert result == number
        with lock:
            held = sum(made) - used
        assert held <= max(budget, size), "what is made and not yet used up"
        used += size
    assert used == sum(sizes) and len(made) == len(sizes)


def test_errors_keep_their_place() -> None:
    def make(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    found = []
    with pytest.raises(ValueError, match="two"):
        for item, _ in ahead(range(5), make, lambda item: 1, 100):
            found.append(item)
    assert found == [0, 1]


def test_it_runs_beside_the_consumer() -> None:
    """The second item is made while the first is used."""
    second = threading.Event()

    def make(item: int) -> int:
        if item == 1:
            second.set()
        return item

    for item, _ in ahead(range(3), make, lambda item: 1, 100):
        if item == 0:
            assert second.wait(10)


def test_leaving_early_ends_the_thread() -> None:
    before = threading.active_count()
    stream = ahead(range(100), lambda item: item, lambda item: 1, 100)
    next(stream)
    stream.close()
    assert threading.active_count() == before
