"""The mix against its target: over any period of samples, over any prefix, and from any index."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mix.schedule import Schedule
from data_pipeline.mix.shares import PERIOD, TOLERANCE, shares, slots, with_fixed

NAMES = [f"d{number}" for number in range(62)]
TOKENS = st.lists(st.integers(0, 10**12), min_size=1, max_size=40)


@settings(max_examples=200)
@given(tokens=TOKENS, temperature=st.floats(0.3, 20), data=st.data())
def test_shares_follow_the_formula(tokens: list[int], temperature: float, data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.floats(0, 10), min_size=len(tokens), max_size=len(tokens)))
    weights = [w if w > 1e-6 else 0.0 for w in drawn]
    if not any(n and w for n, w in zip(tokens, weights, strict=True)):
        return
    got = shares(np.array(tokens), np.array(weights), temperature)
    assert got.sum() == pytest.approx(1)
    exact = [w * float(n) ** (1 / temperature) if n else 0.0 for n, w in zip(tokens, weights, strict=True)]
    assert np.allclose(got, np.array(exact) / sum(exact), rtol=1e-6, atol=1e-12)


@settings(max_examples=200)
@given(parts=st.lists(st.floats(0, 1), min_size=1, max_size=60), fixed=st.lists(st.floats(0, 0.4), max_size=2))
def test_slots_are_whole_and_near(parts: list[float], fixed: list[float]) -> None:
    values = np.array([part if part > 1e-9 else 0 for part in parts])
    if not values.sum():
        return
    target = with_fixed(values / values.sum(), fixed)
    counts = slots(target, NAMES)
    assert counts.sum() == PERIOD
    assert np.array_equal(counts > 0, target > 0)  # what has a share is drawn, and nothing else
    assert np.abs(counts / PERIOD - target).max() <= TOLERANCE


COUNTS = st.lists(st.integers(0, 120), min_size=1, max_size=12).filter(any)


@settings(max_examples=200)
@given(counts=COUNTS, data=st.data())
def test_every_prefix_is_within_one_sample(counts: list[int], data: st.DataObject) -> None:
    schedule = Schedule(np.array(counts, dtype=np.int64))
    period = sum(counts)
    seen = np.zeros(len(counts), dtype=np.int64)
    for index in range(period + 3):
        assert np.array_equal(schedule.before(index), seen)
        assert np.all(np.abs(seen * period - index * np.array(counts)) < period)  # lag below 1, in whole numbers
        domain, before = schedule(index)
        assert before == seen[domain]
        seen[domain] += 1
    index = data.draw(st.integers(0, 10**12))
    domain, before = schedule(index)
    assert before == schedule.before(index)[domain]
    after = schedule.before(index + 1) - schedule.before(index)
    assert after.sum() == 1 and after[domain] == 1


@settings(max_examples=10)
@given(
    tokens=st.lists(st.integers(1, 10**11), min_size=1, max_size=30),
    temperature=st.floats(1, 5),
    low=st.integers(0, 10**9),
)
def test_any_ten_thousand_samples_have_the_target_shares(tokens: list[int], temperature: float, low: int) -> None:
    target = shares(np.array(tokens), np.ones(len(tokens)), temperature)
    schedule = Schedule(slots(target, NAMES))
    drawn = np.bincount([schedule(i)[0] for i in range(low, low + 10_000)], minlength=len(tokens))
    assert np.abs(drawn / 10_000 - target).max() <= 0.001
