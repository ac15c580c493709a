"""Sampling: what the options leave, how often a token comes, and that a row knows nothing of its batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refractor_megatron.errors import ConfigError
from refractor_megatron.evaluation.sampling import SamplingOptions, next_tokens

WIDTH = 12
LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=WIDTH, max_size=WIDTH).map(torch.tensor)
OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.0, 1e-300, 0.3, 0.8, 1.0, 5.0]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1.0]),
    top_k=st.integers(0, WIDTH + 1),
    seed=st.integers(0, 2**40),
)


def draw(logits: torch.Tensor, options: SamplingOptions, count: int) -> torch.Tensor:
    """``count`` tokens, one after the other, from one row's generator."""
    generator = options.generator()
    return torch.stack([next_tokens(logits[None], [options], [generator])[0] for _ in range(count)])


def left(logits: torch.Tensor, options: SamplingOptions) -> dict[int, float]:
    """Tokens that the options leave, with their probabilities: the definition, one token at a time."""
    if options.temperature == 0:
        return {int(logits.argmax()): 1.0}
    ranked = sorted(range(WIDTH), key=lambda token: (-float(logits[token]), token))
    top = float(logits.max())
    weight = {token: math.exp((float(logits[token]) - top) / options.temperature) for token in ranked}
    ranked = ranked[: options.top_k or WIDTH]
    total = sum(weight[token] for token in ranked)
    kept: dict[int, float] = {}
    for token in ranked:  # the smallest set that reaches top_p
        if options.top_p < 1 and sum(kept.values()) / total >= options.top_p - 1e-12:
            break
        kept[token] = weight[token]
    return {token: value / sum(kept.values()) for token, value in kept.items()}


@given(LOGITS, OPTIONS)
def test_only_what_the_options_leave_is_chosen(logits: torch.Tensor, options: SamplingOptions) -> None:
    expected = left(logits, options)
    assert set(draw(logits, options, 20).tolist()) <= set(expected)


@given(LOGITS, OPTIONS)
def test_every_number_of_the_generator_gives_its_token(logits: torch.Tensor, options: SamplingOptions) -> None:
    """The whole distribution, not a sample of it: the token of ``u`` is the inverse of the cumulative sum at ``u``."""
    expected = left(logits, options)
    ranked = sorted(expected, key=lambda token: (-float(logits[token]), token))
    generator = options.generator()
    for chosen in draw(logits, options, 10).tolist():
        u = 0.0 if options.temperature == 0 else torch.rand((), dtype=torch.float64, generator=generator).item()
        before = 0.0
        for token in ranked:
            if token == chosen:
                assert before - 1e-9 <= u <= before + expected[token] + 1e-9
            before += expected[token]


@given(st.lists(st.tuples(LOGITS, OPTIONS), min_size=1, max_size=5))
def test_a_row_does_not_depend_on_its_batch(rows: list[tuple[torch.Tensor, SamplingOptions]]) -> None:
    logits, options = torch.stack([row[0] for row in rows]), [row[1] for row in rows]
    generators = [option.generator() for option in options]
    together = torch.stack([next_tokens(logits, options, generators) for _ in range(4)], dim=1)
    for row, alone in enumerate(draw(logits[i], options[i], 4) for i in range(len(rows))):
        assert torch.equal(together[row], alone)


@given(LOGITS, OPTIONS, st.sets(st.integers(0, WIDTH - 1), max_size=WIDTH - 1))
def test_masked_tokens_are_never_chosen(logits: torch.Tensor, options: SamplingOptions, hidden: set[int]) -> None:
    masked = logits.clone()
    masked[list(hidden)] = float("-inf")
    assert hidden.isdisjoint(draw(masked, options, 20).tolist())


@given(LOGITS, OPTIONS)
def test_a_seed_reproduces(logits: torch.Tensor, options: SamplingOptions) -> None:
    assert torch.equal(draw(logits, options, 8), draw(logits, options, 8))


def test_seeds_differ() -> None:
    options = SamplingOptions(temperature=1.0, top_p=1.0)
    drawn = [draw(torch.zeros(WIDTH), replace(options, seed=seed), 16).tolist() for seed in range(8)]
    assert len({tuple(row) for row in drawn}) == 8


@given(LOGITS)
def test_temperature_zero_is_the_most_likely_token(logits: torch.Tensor) -> None:
    """Also in a batch whose other rows are sampled."""
    options = [SamplingOptions(temperature=0.0), SamplingOptions(temperature=1.0)]
    chosen = next_tokens(torch.stack([logits, logits]), options, [option.generator() for option in options])
    assert logits[chosen[0]] == logits.max() and int(chosen[0]) == int(logits.argmax())


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0.0}, {"top_p": 1.1},
     {"top_p": math.nan}, {"top_k": -1}, {"seed": -1}, {"seed": 2**63}],
)  # fmt: skip
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        SamplingOptions(**wrong)  # type: ignore[arg-type]
