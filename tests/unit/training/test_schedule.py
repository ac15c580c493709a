"""Learning-rate schedule."""

import math

from hypothesis import given
from hypothesis import strategies as st

from refractor_megatron.training.schedule import Schedule

steps = st.tuples(st.integers(1, 50), st.integers(1, 500)).map(lambda t: (t[0], t[0] + t[1]))


@given(steps, st.sampled_from(["constant", "rm"]))
def test_shape(lengths: tuple[int, int], tail: str) -> None:
    warmup, cosine = lengths
    lr = Schedule(1.0, 0.1, warmup, cosine, tail, 0.75)
    assert lr(warmup) == 1.0 and math.isclose(lr(cosine), 0.1)
    values = [lr(t) for t in range(1, cosine + 50)]
    assert all(a < b for a, b in zip(values[: warmup - 1], values[1:warmup], strict=False))
    assert all(a >= b for a, b in zip(values[warmup - 1 :], values[warmup:], strict=False))
    assert min(values) > 0


def test_robbins_monro_tail_against_the_constant_floor() -> None:
    """Partial sums on a log grid: Σ lr keeps growing; Σ lr² converges with the tail and diverges with the floor."""
    tail, floor = Schedule(1.0, 0.1, 1, 100, "rm", 0.75), Schedule(1.0, 0.1, 1, 100, "constant", 0.75)
    assert tail.satisfies_robbins_monro and not floor.satisfies_robbins_monro
    decades = [range(10**k, 10 ** (k + 1)) for k in range(2, 6)]
    first = [sum(map(tail, d)) for d in decades]
    second = [sum(tail(t) ** 2 for t in d) for d in decades]
    assert all(b > a for a, b in zip(first, first[1:], strict=False))  # p = 3/4: each decade adds 10^(1/4) times more
    assert all(b < 0.4 * a for a, b in zip(second, second[1:], strict=False))  # and 10^(-1/2) of the squares
    assert sum(floor(t) ** 2 for t in decades[-1]) > 5 * sum(floor(t) ** 2 for t in decades[-2])


def test_tail_continues_without_a_jump() -> None:
    lr = Schedule(1.0, 0.1, 10, 100, "rm", 0.75)
    assert abs(lr(101) - lr(100)) < 0.001
