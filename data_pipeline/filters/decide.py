"""Which documents are kept: thresholds over stored signals, so another threshold needs no second look at the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.filters.audit import AuditRow
from data_pipeline.filters.quality import Rule, chosen_rules
from data_pipeline.options import Filters

LANGUAGE_RULE, SCORE_RULE, PERPLEXITY_RULE = "language/1", "language-score/1", "perplexity-band/1"
#: A language with fewer documents has no perplexity band: percentiles of a handful say nothing.
LEAST_DOCUMENTS = 100

Signals = Mapping[str, npt.NDArray[np.generic]]
Bands = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Decision:
    """``keep`` bool [n]; ``rows``: one for each document dropped, in order; ``failing``: how many documents
    fail each rule that was tried, whichever rule they were dropped by."""

    keep: npt.NDArray[np.bool_]
    rows: tuple[AuditRow, ...]
    failing: dict[str, int]


@dataclass(frozen=True)
class _Verdict:
    """One rule on a whole shard: which documents fail it, and what the audit says of them."""

    filter: str
    rule: str
    fails: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.generic]
    thresholds: npt.NDArray[np.float64]  # NaN: none
    details: Sequence[str]


def perplexity_bands(
    perplexities: npt.NDArray[np.floating],
    languages: npt.NDArray[np.str_],
    low: float,
    high: float,
    least: int = LEAST_DOCUMENTS,
) -> dict[str, tuple[float, float]]:
    """The band of perplexity to keep in each language, ends included: percentiles, as Wenzek et al. 2020 (CCNet).

    ``perplexities`` [n] and ``languages`` [n] of all shards in any order; ``low`` and ``high``: 0..100. Values that are
    not finite (no model, no words) are left out. A language with fewer than ``least`` values has no band.
    """
    assert 0 <= low < high <= 100 and len(perplexities) == len(languages)
    bands = {}
    known = np.isfinite(perplexities)
    for language in np.unique(languages[known]).tolist():
        values = np.sort(perplexities[known & (languages == language)].astype(np.float64))
        if len(values) >= least:
            bands[str(language)] = (float(np.percentile(values, low)), float(np.percentile(values, high)))
    return bands


def decide(
    signals: Signals,
    perplexity: npt.NDArray[np.floating] | None,
    bands: Bands | None,
    options: Filters,
    rules: Sequence[Rule] | None = None,
) -> Decision:
    """Judges the documents of one shard by ``stages.read_signals``. Order: language, its certainty, rules, perplexity.

    The audit names the first rule that a document fails. ``perplexity`` [n] needs ``bands``; a document whose language
    has no band, or whose perplexity is not finite, passes. ``rules``: those on by default unless given.
    """
    count = len(signals["language"])
    open_rows = np.ones(count, np.bool_)
    first: dict[int, AuditRow] = {}
    failing = {}
    for verdict in _verdicts(signals, perplexity, bands, options, chosen_rules() if rules is None else rules):
        failing[verdict.rule] = int(np.count_nonzero(verdict.fails))
        for row in np.flatnonzero(verdict.fails & open_rows).tolist():
            first[row] = _audit_row(verdict, signals, row)
        open_rows &= ~verdict.fails
    return Decision(open_rows, tuple(first[row] for row in sorted(first)), failing)


def _verdicts(
    signals: Signals,
    perplexity: npt.NDArray[np.floating] | None,
    bands: Bands | None,
    options: Filters,
    rules: Sequence[Rule],
) -> list[_Verdict]:
    if not options.enabled:
        return []
    verdicts = []
    language, score = signals["language"], np.asarray(signals["language_score"], np.float32)
    none = np.full(len(language), np.nan)
    if options.languages is not None:
        wrong = ~np.isin(language, options.languages)
        details = [f"language {one}" for one in language.tolist()]
        verdicts.append(_Verdict("language", LANGUAGE_RULE, wrong, score, none, details))
    if options.language_score > 0:
        limit = np.full(len(score), options.language_score)
        unsure = score < np.float32(options.language_score)
        details = [f"language {one}" for one in language.tolist()]
        verdicts.append(_Verdict("language", SCORE_RULE, unsure, score, limit, details))
    for rule in rules if options.quality else ():
        values, fails = np.asarray(signals[rule.signal], np.float32), rule.fails(signals)
        limits = none.copy()
        for row in np.flatnonzero(fails).tolist():
            limits[row] = rule.threshold(float(values[row]))
        verdicts.append(_Verdict("quality", rule.name, fails, values, limits, [rule.signal] * len(values)))
    if perplexity is not None and bands is not None:
        verdicts.append(_perplexity(language, np.asarray(perplexity, np.float64), bands))
    return verdicts


def _perplexity(language: npt.NDArray[np.generic], perplexity: npt.NDArray[np.float64], bands: Bands) -> _Verdict:
    everything = (-np.inf, np.inf)
    low, high = (np.array([bands.get(one, everything)[end] for one in language.tolist()], float) for end in (0, 1))
    under, over = perplexity < low, perplexity > high  # False for NaN
    inside = ~np.isfinite(perplexity)
    details = [f"band of language {one}" for one in language.tolist()]
    fails = (under | over) & ~inside
    return _Verdict("perplexity", PERPLEXITY_RULE, fails, perplexity, np.where(under, low, high), details)


def _audit_row(verdict: _Verdict, signals: Signals, row: int) -> AuditRow:
    limit = float(verdict.thresholds[row])
    return AuditRow(
        id=np.asarray(signals["id"])[row].tobytes().hex(),
        source=int(np.asarray(signals["source"])[row]),
        action="drop",
        filter=verdict.filter,
        score=float(np.asarray(verdict.scores)[row]),
        threshold=None if np.isnan(limit) else limit,
        rule=verdict.rule,
        detail=verdict.details[row],
    )
