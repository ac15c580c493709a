"""Look-ups in a hash table of places against a dictionary."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.filters.key_table import KeyTable

#: Close together and far apart, with both ends of the range: what a multiplicative hash may crowd into a few slots.
_KEYS = st.one_of(st.integers(0, 40), st.integers(0, 2**64 - 1), st.integers(0, 40).map(lambda n: n << 58))


@settings(max_examples=200, deadline=None)
@given(st.lists(_KEYS, unique=True, max_size=60), st.lists(_KEYS, max_size=20))
def test_places_are_those_of_a_dictionary(keys: list[int], others: list[int]) -> None:
    place = {key: at for at, key in enumerate(keys)}
    wanted = [*keys[::-1], *others]
    found = KeyTable(np.array(keys, np.uint64)).find(np.array(wanted, np.uint64))
    assert found.tolist() == [place.get(key, -1) for key in wanted]


def test_neighbouring_numbers_and_signed_keys() -> None:
    keys = np.arange(5000, dtype=np.int64) << 21
    table = KeyTable(keys)
    assert np.array_equal(table.find(keys), np.arange(5000))
    assert (table.find(keys + 1) == -1).all()
