"""What a dataset is a function of: options that make sense, evaluation files, sources; before any work is done."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from data_pipeline import manifest as manifests
from data_pipeline.options import Decontaminate, Options
from data_pipeline.sources.base import Source
from data_pipeline.sources.fingerprint import sha256_of
from data_pipeline.versions import CODE_VERSION
from refractor_megatron.errors import ConfigError
from refractor_megatron.tokenizer import Tokenizer

#: Options that change no byte of a dataset that they let come into being.
_FREE = ("engine", "max_bad_fraction")


def check_options(options: Options, tokenizer: Tokenizer | None) -> None:
    """Raises ``ConfigError`` for options that are impossible, or that another one leaves without effect."""
    if not options.name or options.name.startswith(".") or "/" in options.name:
        raise ConfigError(f"data.name {options.name!r} cannot name a folder; use letters, digits and dashes.")
    if options.max_mb <= 0:
        raise ConfigError(f"data.max_mb must be above 0, not {options.max_mb:g}.")
    if not 0 < options.heldout_fraction < 1:
        raise ConfigError(f"data.heldout_fraction must lie between 0 and 1, not {options.heldout_fraction:g}.")
    if tokenizer is not None and tokenizer.vocab_size > options.vocab_size:
        raise ConfigError(
            f"The tokenizer has {tokenizer.vocab_size} ids and model.vocab_size is {options.vocab_size}: "
            f"set model.vocab_size={tokenizer.vocab_size}."
        )
    _check_filters(options)
    _check_curriculum(options)
    if options.decontaminate.files and not options.decontaminate.enabled:
        raise ConfigError("data.decontaminate.files has no effect without data.decontaminate.enabled=true; set it.")


def _check_filters(options: Options) -> None:
    filters = options.filters
    if not 0 <= filters.perplexity_low < filters.perplexity_high <= 100:
        raise ConfigError(
            "data.filters.perplexity_low must be below perplexity_high, both from 0 to 100, not "
            f"{filters.perplexity_low:g} and {filters.perplexity_high:g}."
        )
    set_apart = filters.rules_on or filters.rules_off or filters.thresholds or filters.languages is not None
    if set_apart and not filters.enabled:
        raise ConfigError("data.filters has rules, thresholds or languages but is off; set data.filters.enabled=true.")
    if filters.enabled:
        from data_pipeline.filters.quality import chosen_rules, thresholds_of

        chosen_rules(filters.rules_on, filters.rules_off, thresholds_of(filters.thresholds))
    if filters.languages is not None:
        from data_pipeline.filters.language import languages

        for code in filters.languages:
            if code not in languages():
                close = get_close_matches(code, languages(), n=1, cutoff=0.3)
                hint = f"did you mean {close[0]!r}" if close else f"known are {', '.join(languages())}"
                raise ConfigError(f"data.filters.languages: no language has the code {code!r}; {hint}.")


def _check_curriculum(options: Options) -> None:
    from data_pipeline.curriculum.routing import check_lengths

    curriculum, tasks = options.curriculum, options.tasks
    if curriculum.lengths:
        check_lengths(curriculum.lengths, curriculum.short_share)
        return
    for key, used in (
        ("data.tasks.retrieval", tasks.retrieval > 0),
        ("data.tasks.long_range", tasks.long_range > 0),
        ("data.mix.temperature", options.mix.temperature != 1),
    ):
        if used:
            raise ConfigError(f"{key} has no effect without stages; set data.curriculum.lengths, e.g. to [2048,8192].")


def check_weights(options: Options, sources: Sequence[Source]) -> None:
    """Raises ``ConfigError`` for a source's weight that the mix would not use."""
    for source in sources:
        if source.weight != 1 and (options.mix.by != "source" or not options.curriculum.lengths):
            raise ConfigError(
                f"Source {source.name} has weight {source.weight:g}, which takes data.curriculum.lengths and "
                "data.mix.by=source; set them or remove the weight."
            )


def evaluation_files(options: Decontaminate) -> list[tuple[str, str]]:
    """(path, sha256) of the user's evaluation files. Raises ``ConfigError`` for one that cannot be read."""
    found = []
    for text in options.files:
        path = Path(text).absolute()
        try:
            found.append((str(path), sha256_of(path)))
        except OSError as error:
            raise ConfigError(
                f"Cannot read the evaluation file {text} ({error.strerror}); correct its path."
            ) from error
    return found


def parameters(options: Options, evaluation: Sequence[tuple[str, str]], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The options that a dataset depends on, for its digest and its manifest."""
    body = {name: value for name, value in asdict(options).items() if name not in _FREE}
    body["decontaminate"]["files"] = [[Path(path).name, sha256] for path, sha256 in evaluation]
    return body if tokenizer is None else {**body, "tokenizer": tokenizer.digest}


def digest(body: dict[str, Any], sources: Sequence[Source]) -> str:
    """sha256 of ``parameters``, of all that sources state about themselves but when they were fetched, and the code."""
    inputs = [
        [one.name, one.version, one.identity, one.weight, one.licence, one.licence_file, one.schema] for one in sources
    ]
    return hashlib.sha256(manifests.canonical([CODE_VERSION, body, inputs])).hexdigest()
