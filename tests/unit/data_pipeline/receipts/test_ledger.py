"""Ledgers: none exists that does not balance, and a step starts with what the one before has kept."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.receipts.ledger import BuildError, Ledger, check_chain

counts = st.dictionaries(st.sampled_from(["blank", "short", "language", "json"]), st.integers(0, 10**12))


def ledger(name: str, kept: int, dropped: dict[str, int], quarantined: dict[str, int]) -> Ledger:
    entered = kept + sum(dropped.values()) + sum(quarantined.values())
    return Ledger(name, entered, kept, dropped, quarantined)


@given(st.integers(0, 10**12), counts, counts, st.integers(-3, 3))
def test_only_what_balances_exists(kept: int, dropped: dict[str, int], quarantined: dict[str, int], off: int) -> None:
    entered = kept + sum(dropped.values()) + sum(quarantined.values()) + off
    if off == 0:
        assert Ledger("step", entered, kept, dropped, quarantined).entered == entered
    else:
        with pytest.raises(BuildError, match=f"^Step step: {entered} documents came in, but {kept} kept"):
            Ledger("step", entered, kept, dropped, quarantined)


@given(st.lists(st.tuples(st.integers(0, 99), counts, counts), max_size=5), st.randoms())
def test_sum_is_that_of_all_tasks_in_any_order(
    parts: list[tuple[int, dict[str, int], dict[str, int]]], chance: random.Random
) -> None:
    entries = [ledger("task", *part).as_json() for part in parts]
    whole = Ledger.sum("step", entries)
    chance.shuffle(entries)
    assert Ledger.sum("step", entries) == whole
    assert json.dumps(Ledger.sum("step", entries).as_json()) == json.dumps(whole.as_json())
    assert whole.kept == sum(part[0] for part in parts)
    for reason in ("blank", "short", "language", "json"):
        assert whole.dropped.get(reason, 0) == sum(part[1].get(reason, 0) for part in parts)
        assert whole.quarantined.get(reason, 0) == sum(part[2].get(reason, 0) for part in parts)


def test_task_that_does_not_balance_is_named_with_its_numbers() -> None:
    good = {"in": 3, "kept": 2, "dropped": {"blank": 1}, "quarantined": {}, "bytes": 7}
    bad = {"in": 4, "kept": 2, "dropped": {"blank": 1}, "quarantined": {}}
    with pytest.raises(BuildError, match=r"^Step ingest, task 1: 4 documents came in, but 2 kept \+ 1 dropped \+ 0 "):
        Ledger.sum("ingest", [good, bad])


@pytest.mark.parametrize(
    "entry", [{}, {"in": 1, "kept": 1, "dropped": {}}, {"in": "x", "kept": 1, "dropped": {}, "quarantined": {}}]
)
def test_what_is_no_ledger_is_refused(entry: dict[str, object]) -> None:
    with pytest.raises(BuildError, match="is no ledger"):
        Ledger.of("ingest", entry)


def test_counts_below_zero_are_refused() -> None:
    with pytest.raises(BuildError, match="has a count below 0"):
        Ledger("step", 1, 1, {"a": -1, "b": 1})
    with pytest.raises(BuildError, match="-1 kept"):
        Ledger("step", 0, -1, {"a": 1})


def test_step_follows_the_one_before() -> None:
    first = Ledger("ingest", 5, 4, {"blank": 1})
    assert Ledger("dedup", 4, 4).follow(first).kept == 4
    with pytest.raises(BuildError, match="^Step dedup: 3 documents came in, but step ingest kept 4.$"):
        Ledger("dedup", 3, 3).follow(first)


@given(st.lists(st.tuples(counts, counts), min_size=1, max_size=5), st.integers(0, 50), st.data())
def test_chain_survives_json_and_breaks_with_any_number(
    parts: list[tuple[dict[str, int], dict[str, int]]], kept: int, data: st.DataObject
) -> None:
    chain: list[Ledger] = []
    for number, (dropped, quarantined) in reversed(list(enumerate(parts))):
        chain.insert(0, ledger(f"step {number}", kept, dropped, quarantined))
        kept = chain[0].entered
    entries = json.loads(json.dumps([one.as_json() for one in chain]))
    assert check_chain(entries) == chain
    entry = data.draw(st.sampled_from(entries))
    entry[data.draw(st.sampled_from(["in", "kept"]))] += data.draw(st.sampled_from([-1, 1]))
    with pytest.raises(BuildError):
        check_chain(entries)
