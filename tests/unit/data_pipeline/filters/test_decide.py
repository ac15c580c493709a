"""Decisions: thresholds over stored signals, the first failed rule named, bands of perplexity by language."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.filters.decide import (
    LANGUAGE_RULE,
    LEAST_DOCUMENTS,
    PERPLEXITY_RULE,
    SCORE_RULE,
    decide,
    perplexity_bands,
)
from data_pipeline.filters.quality import RULES, chosen_rules
from data_pipeline.filters.signals import SIGNALS
from data_pipeline.options import Filters

Columns = dict[str, npt.NDArray[np.generic]]
#: Values that pass every rule.
GOOD = {"words": 500.0, "mean_word_length": 5.0, "alphanumeric": 0.9, "alphabetic_words": 0.95, "stop_words": 8.0}
GOOD |= {"sentences": 20.0, "terminal_lines": 0.8}


def signals(count: int, languages: Sequence[str] | None = None, **changed: Sequence[float]) -> Columns:
    """``count`` documents that pass every rule but for the ``changed`` signals."""
    columns: Columns = {name: np.full(count, GOOD.get(name, 0.0), np.float32) for name in SIGNALS}
    columns |= {name: np.array(values, np.float32) for name, values in changed.items()}
    columns["id"] = np.frombuffer(b"".join(i.to_bytes(16, "big") for i in range(count)), np.uint8).reshape(-1, 16)
    columns["source"] = np.arange(count, dtype=np.int32) % 3
    columns["framed"] = np.zeros(count, np.bool_)
    columns["language"] = np.array(languages or ["en"] * count, np.str_)
    columns.setdefault("language_score", np.ones(count, np.float32))
    return columns


ON = Filters(enabled=True)


def test_good_documents_pass_every_rule() -> None:
    decision = decide(signals(4), None, None, ON, RULES)
    assert decision.keep.all() and decision.rows == ()
    assert decision.failing == {rule.name: 0 for rule in RULES}


def test_disabled_filters_keep_everything() -> None:
    bad = signals(2, words=[0, 0])
    assert decide(bad, None, None, Filters()).keep.all()
    assert decide(bad, None, None, Filters(enabled=True, quality=False)).keep.all()
    assert not decide(bad, None, None, ON).keep.any()


def test_one_row_for_each_drop_with_rule_score_and_threshold() -> None:
    decision = decide(signals(3, words=[9, 10, 8]), None, None, ON)
    assert decision.keep.tolist() == [False, True, False]
    assert [int(row.id, 16) for row in decision.rows] == [0, 2]
    first, last = decision.rows
    assert (first.action, first.filter, first.rule) == ("drop", "quality", "loose-word-count/1")
    assert (first.score, first.threshold, first.detail) == (9.0, 10, "words")
    assert (first.source, last.source, last.score) == (0, 2, 8.0)
    assert decision.failing["loose-word-count/1"] == 2


def test_first_failing_rule_in_order_is_named_and_all_are_counted() -> None:
    columns = signals(2, words=[5, 500], lorem_ipsum=[1, 0], alphabetic_words=[0.1, 0.1])
    decision = decide(columns, None, None, ON)
    assert [row.rule for row in decision.rows] == ["c4-lorem-ipsum/1", "loose-alphabetic-words/1"]
    assert decision.failing["loose-word-count/1"] == 1 and decision.failing["loose-alphabetic-words/1"] == 2


def test_two_sided_rule_names_the_threshold_that_was_passed() -> None:
    rows = decide(signals(2, mean_word_length=[1.5, 20]), None, None, ON).rows
    assert [(row.score, row.threshold) for row in rows] == [(1.5, 2), (20.0, 15)]


def test_language_and_its_certainty_come_first() -> None:
    columns = signals(4, ["en", "de", "fr", "de"], words=[500, 5, 500, 500], language_score=[0.9, 0.9, 0.9, 0.2])
    decision = decide(columns, None, None, Filters(enabled=True, languages=("de", "en"), language_score=0.5))
    assert [(int(row.id, 16), row.rule) for row in decision.rows] == [
        (1, "loose-word-count/1"),
        (2, LANGUAGE_RULE),
        (3, SCORE_RULE),
    ]
    assert decision.rows[1].detail == "language fr" and decision.rows[1].threshold is None
    assert decision.rows[2].score == pytest.approx(0.2) and decision.rows[2].threshold == 0.5


def test_certainty_at_its_threshold_passes() -> None:
    columns = signals(2, language_score=[0.7, np.nextafter(np.float32(0.7), np.float32(0))])
    assert decide(columns, None, None, Filters(enabled=True, language_score=0.7)).keep.tolist() == [True, False]


def test_perplexity_outside_the_band_of_its_language() -> None:
    columns = signals(6, ["en", "en", "en", "de", "ja", "en"])
    perplexity = np.array([10.0, 9.9, 100.1, 9.9, 1e9, np.nan])
    decision = decide(columns, perplexity, {"en": (10.0, 100.0), "de": (1.0, 50.0)}, ON)
    assert decision.keep.tolist() == [True, False, False, True, True, True]
    assert [(row.filter, row.rule, row.score, row.threshold) for row in decision.rows] == [
        ("perplexity", PERPLEXITY_RULE, 9.9, 10.0),
        ("perplexity", PERPLEXITY_RULE, 100.1, 100.0),
    ]
    assert decision.rows[0].detail == "band of language en"


def test_a_moved_threshold_changes_the_decision() -> None:
    columns = signals(2, words=[30, 60])
    strict = chosen_rules(on=["gopher-word-count"])
    assert decide(columns, None, None, ON).keep.tolist() == [True, True]
    assert decide(columns, None, None, ON, strict).keep.tolist() == [False, True]
    moved = chosen_rules(thresholds={"loose-word-count": (61, None)})
    assert decide(columns, None, None, ON, moved).keep.tolist() == [False, False]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rows_and_mask_agree_with_every_single_rule(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 8))
    floats = st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 4.0, 60.0]), min_size=count, max_size=count)
    changed = {name: data.draw(floats) for name in ("words", "alphabetic_words", "top_2gram", "bullet_lines")}
    columns = signals(
        count, data.draw(st.lists(st.sampled_from(["en", "ja"]), min_size=count, max_size=count)), **changed
    )
    decision = decide(columns, None, None, ON, RULES)
    failing = np.array([rule.fails(columns) for rule in RULES]).reshape(len(RULES), count)
    assert decision.keep.tolist() == (~failing.any(axis=0)).tolist()
    expected = [RULES[int(np.argmax(failing[:, row]))].name for row in range(count) if failing[:, row].any()]
    assert [row.rule for row in decision.rows] == expected
    assert decision.failing == {rule.name: int(mask.sum()) for rule, mask in zip(RULES, failing, strict=True)}


def test_bands_are_percentiles_of_each_language() -> None:
    values = np.arange(1000.0)
    languages = np.array(["en", "de"] * 500, np.str_)
    bands = perplexity_bands(values, languages, 10, 90)
    for start, language in enumerate(("en", "de")):
        own = values[start::2]
        assert bands[language] == (np.percentile(own, 10), np.percentile(own, 90))
    assert perplexity_bands(values, languages, 0, 100) == {"en": (0.0, 998.0), "de": (1.0, 999.0)}


def test_bands_need_enough_documents() -> None:
    languages = np.array(["en"] * LEAST_DOCUMENTS + ["de"] * (LEAST_DOCUMENTS - 1), np.str_)
    values = np.ones(len(languages))
    assert set(perplexity_bands(values, languages, 5, 95)) == {"en"}
    values[0] = np.inf  # not a value: one too few
    assert perplexity_bands(values, languages, 5, 95) == {}


@given(st.permutations(range(40)))
@settings(max_examples=30)
def test_bands_do_not_depend_on_the_order_of_documents(order: list[int]) -> None:
    generator = np.random.default_rng(1)
    values, languages = generator.lognormal(4, 1, 40), np.array(["en", "de"] * 20, np.str_)
    there, here = (perplexity_bands(values[o], languages[o], 7, 93, least=5) for o in (np.arange(40), np.array(order)))
    assert there == here and list(there) == list(here)
