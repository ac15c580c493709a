"""The sample order is a bijection for every size and key."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.permutation import Permutation


@settings(max_examples=150)
@given(n=st.integers(1, 1500), key=st.binary(max_size=40))
def test_bijection(n: int, key: bytes) -> None:
    permutation = Permutation(n, key)
    assert sorted(permutation(i) for i in range(n)) == list(range(n))


@given(n=st.integers(1, 2**62), data=st.data())
def test_large_domains_stay_in_range(n: int, data: st.DataObject) -> None:
    permutation = Permutation(n, b"key")
    one, two = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))
    assert 0 <= permutation(one) < n
    assert (permutation(one) == permutation(two)) == (one == two)


def test_order_looks_random() -> None:
    """No trend, no neighbours kept together, and another key gives an unrelated order."""
    n = 4000
    first, second = (np.array([Permutation(n, key)(i) for i in range(n)]) for key in (b"a", b"b"))
    index = np.arange(n)
    for left, right in ((index, first), (first[1:], first[:-1]), (first, second)):
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.06
    assert np.count_nonzero(np.abs(np.diff(first)) == 1) < 15
    assert np.count_nonzero(first == second) < 10
