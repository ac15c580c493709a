from __future__ import annotations

import re

import numpy as np
import pytest

from data_pipeline.mix.schedule import Schedule
from data_pipeline.mix.shares import PERIOD, check, shares, slots, with_fixed
from refractor_megatron.errors import DataError

NAMES = [f"d{number}" for number in range(1000)]
TOKENS = np.array([1_000_000, 10_000, 0])


def test_temperature_evens_out() -> None:
    """By hand: 100 to 1 becomes 10 to 1 at T = 2, and 1 to 1 at infinity; weights come on top."""
    ones = np.ones(3)
    assert shares(TOKENS, ones, 1.0) == pytest.approx([100 / 101, 1 / 101, 0])
    assert shares(TOKENS, ones, 2.0) == pytest.approx([10 / 11, 1 / 11, 0])
    assert shares(TOKENS, ones, np.inf) == pytest.approx([0.5, 0.5, 0])
    assert shares(TOKENS, np.array([1.0, 5.0, 1.0]), 2.0) == pytest.approx([10 / 15, 5 / 15, 0])
    assert shares(TOKENS, np.array([0.0, 5.0, 1.0]), 2.0).tolist() == [0, 1, 0]


def test_a_low_temperature_does_not_overflow() -> None:
    assert shares(np.array([10**12, 10**12, 10**11]), np.ones(3), 0.01) == pytest.approx([0.5, 0.5, 0])


@pytest.mark.parametrize(
    ("tokens", "weights", "temperature", "message"),
    [
        ([1], [1.0], 0.0, "data.mix.temperature must be above 0, not 0"),
        ([1], [1.0], np.nan, "data.mix.temperature must be above 0"),
        ([1], [-1.0], 1.0, "weight of a source must be a number of at least 0"),
        ([1], [np.inf], 1.0, "weight of a source must be a number of at least 0"),
        ([0, 5], [1.0, 0.0], 1.0, "No domain has both text and a weight above 0"),
    ],
)
def test_impossible_mixes_are_named(tokens: list[int], weights: list[float], temperature: float, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        shares(np.array(tokens), np.array(weights), temperature)


def test_fixed_shares_come_out_of_the_others() -> None:
    assert with_fixed(np.array([0.5, 0.5]), [0.1, 0.0]) == pytest.approx([0.45, 0.45, 0.1, 0])
    for fixed in ([0.5, 0.5], [-0.1]):
        with pytest.raises(DataError, match="must be at least 0 and add up to less than 1"):
            with_fixed(np.ones(1), fixed)


def test_a_tiny_domain_gets_a_slot() -> None:
    counts = slots(np.array([1 - 3e-7, 1e-7, 2e-7, 0]), NAMES)
    assert counts.tolist() == [PERIOD - 2, 1, 1, 0]


def test_many_tiny_domains_take_from_the_large_ones_within_the_tolerance() -> None:
    tiny = np.full(900, 1e-9)
    counts = slots(np.concatenate([np.full(100, (1 - tiny.sum()) / 100), tiny]), NAMES)
    assert counts.sum() == PERIOD and set(counts[100:]) == {1} and set(counts[:100]) == {91}


def test_rounding_beyond_the_tolerance_fails() -> None:
    tiny = np.full(50, 1e-9)
    with pytest.raises(DataError, match=r"Domain d0 of the mix would get 99.5000% .* its target is 100.0000%"):
        slots(np.concatenate([[1 - tiny.sum()], tiny]), NAMES)
    with pytest.raises(DataError, match="10001 domains are more than the 10000 samples"):
        slots(np.full(10_001, 1 / 10_001), NAMES)
    with pytest.raises(DataError, match="Domain d0 of the mix"):
        check(np.array([50, 50]), np.array([0.502, 0.498]), NAMES)
    check(np.array([50, 50]), np.array([0.4995, 0.5005]), NAMES)


def test_schedule_spreads_evenly() -> None:
    """Shares of a half, a third and a sixth come about every second, third and sixth sample; periods go on alike."""
    schedule = Schedule(np.array([30, 20, 10]))
    drawn = [schedule(i)[0] for i in range(180)]
    for domain, gap in ((0, 2), (1, 4), (2, 10)):
        places = [i for i, d in enumerate(drawn) if d == domain]
        assert max(np.diff(places)) <= gap
    assert [schedule(i + 60) for i in range(60)] == [
        (d, k + [30, 20, 10][d]) for d, k in (schedule(i) for i in range(60))
    ]
