"""The ``data`` section of a configuration as the options of a build. Imports no torch."""

from __future__ import annotations

from data_pipeline import options as o

from ..config import RunConfig


def options_of(cfg: RunConfig, name: str | None = None) -> o.Options:
    """What ``data_pipeline.build`` needs; ``name`` instead of data.name for text of the user's."""
    data = cfg.data
    return o.Options(
        name=name or data.name,
        vocab_size=cfg.model.vocab_size,
        max_mb=data.max_mb,
        heldout_fraction=data.heldout_fraction,
        seed=data.seed,
        max_bad_fraction=data.max_bad_fraction,
        tokenizer_mb=data.tokenizer_mb,
        dedup=_dedup(cfg),
        filters=_filters(cfg),
        decontaminate=_decontaminate(cfg),
        mix=o.Mix(data.mix.by, data.mix.temperature),
        tasks=o.Tasks(data.tasks.retrieval, data.tasks.long_range, data.tasks.window),
        curriculum=o.Curriculum(data.curriculum.lengths, data.curriculum.short_share),
        engine=o.Engine(data.engine.kind, data.engine.workers, data.engine.arguments),
    )


def _dedup(cfg: RunConfig) -> o.Dedup:
    keys = cfg.data.dedup
    return o.Dedup(keys.enabled, keys.threshold, keys.ngram, keys.bands, keys.rows, keys.seed, keys.paragraphs)


def _filters(cfg: RunConfig) -> o.Filters:
    keys = cfg.data.filters
    return o.Filters(
        enabled=keys.enabled,
        languages=keys.languages,
        language_score=keys.language_score,
        quality=keys.quality,
        rules_on=keys.rules_on,
        rules_off=keys.rules_off,
        thresholds=keys.thresholds,
        perplexity_low=keys.perplexity_low,
        perplexity_high=keys.perplexity_high,
        pii=keys.pii,
    )


def _decontaminate(cfg: RunConfig) -> o.Decontaminate:
    keys = cfg.data.decontaminate
    return o.Decontaminate(keys.enabled, keys.ngram, keys.overlap, keys.files)
