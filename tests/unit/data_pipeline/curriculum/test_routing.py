from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.curriculum.routing import Pool, TooLittle, sequences_of


def counted(long: list[int], short: list[int], capacity: int = 100, share: float = 0.35) -> list[int] | TooLittle:
    answer = sequences_of(np.array(long), np.array(short), capacity, share)
    return answer if isinstance(answer, TooLittle) else answer.tolist()


def test_a_sequence_goes_to_long_text_before_short_text_alone() -> None:
    """The third domain has the largest remainder, 0.53 of a sequence, all of it short."""
    assert counted([50, 50, 0], [60, 60, 5000]) == [1, 0, 0]


def test_short_text_lies_as_it_does_in_the_domains() -> None:
    """650 long tokens take 350 short ones, four fifths of them from the domain that has four fifths."""
    assert counted([650, 0], [1000, 4000]) == [8, 2]


@pytest.mark.parametrize(
    ("long", "short", "reason"),
    [
        ([64], [1000], TooLittle(64, 65)),
        ([32, 32], [1000, 1000], TooLittle(64, 65)),
        ([40, 40, 0], [5, 5, 3000], TooLittle(0, 65)),  # no domain with long text fills a sequence
        ([0], [10_000], TooLittle(0, 65)),
    ],
)
def test_a_stage_without_enough_long_text_says_how_much_there_is(
    long: list[int], short: list[int], reason: TooLittle
) -> None:
    assert counted(long, short) == reason


def test_enough_is_enough() -> None:
    assert counted([65], [1000]) == [1]
    assert counted([65], [34]) == TooLittle(0, 65)  # one token is missing, and half of the short text stays


def test_a_pool_gives_the_first_pieces_of_an_order_by_hash() -> None:
    pieces = np.array([[0, 10 * i, 10] for i in range(100)] + [[0, 5000, 35]])
    pool = Pool(pieces, 20, "key")
    assert [pool.tokens(0, 20), pool.tokens(10, 20), pool.tokens(15, 20)] == [1035, 35, 20]  # the last is cut
    order = pool.pieces[:, 1].tolist()
    assert order != sorted(order)
    taken = pool.take(0, 10, 31)
    assert taken[:, 1].tolist() == [first for first in order if first < 5000][:4]
    assert pool.tokens(0, 20) == 1035 - 40
    pool.give(taken)
    assert pool.pieces[-4:].tolist() == taken.tolist()
    assert Pool(pieces, 20, "other").pieces[:, 1].tolist() != order
