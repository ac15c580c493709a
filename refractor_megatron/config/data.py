"""Keys of the ``data`` section: the text of a run and what happens to it before training (spec section 9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .tree import Bounds, Section, branch, leaf

_READER = "training.data_options"
_POSITIVE = Bounds(gt=0)
_SHARE = Bounds(ge=0, le=1)
_AT_LEAST_ONE = Bounds(ge=1)


@dataclass(frozen=True, eq=False, repr=False)
class Dedup(Section):
    """Removal of near-duplicates: MinHash-LSH finds candidates, exact Jaccard decides."""

    enabled: bool = leaf(True, "Remove near-duplicate documents", section="9", reader=_READER)
    threshold: float = leaf(
        0.7, "Exact Jaccard similarity of two documents' sets of n-grams from which they are duplicates", section="own",
        bounds=Bounds(gt=0, le=1), reader=_READER,
    )  # fmt: skip
    ngram: int = leaf(5, "Words of an n-gram", unit="words", section="own", bounds=_AT_LEAST_ONE, reader=_READER)
    bands: int = leaf(
        16, "Bands of a signature; a pair of similarity J is found with probability 1 - (1 - J^rows)^bands",
        section="own", bounds=_AT_LEAST_ONE, reader=_READER,
    )  # fmt: skip
    rows: int = leaf(8, "Hashes of a band", section="own", bounds=_AT_LEAST_ONE, reader=_READER)
    seed: int = leaf(1, "Seed of the hash functions", section="own", bounds=Bounds(ge=0, lt=2**31), reader=_READER)
    paragraphs: bool = leaf(
        False, "Cut paragraphs that stand in another document already", section="own", reader=_READER
    )


@dataclass(frozen=True, eq=False, repr=False)
class Filters(Section):
    """Which documents are fit to train on; each one dropped has a row in the audit."""

    enabled: bool = leaf(False, "Compute signals of every document and filter by them", section="9", reader=_READER)
    languages: tuple[str, ...] | None = leaf(
        None, "Languages to keep, as ISO 639-1 codes; null keeps all", section="9", reader=_READER
    )
    language_score: float = leaf(
        0.0, "Least certainty of a document's language", section="own", bounds=_SHARE, reader=_READER
    )
    quality: bool = leaf(True, "Apply the named quality rules (Gopher, C4, FineWeb)", section="9", reader=_READER)
    rules_on: tuple[str, ...] = leaf((), "Quality rules to apply besides", section="own", reader=_READER)
    rules_off: tuple[str, ...] = leaf((), "Quality rules not to apply", section="own", reader=_READER)
    thresholds: tuple[str, ...] = leaf(
        (), "Thresholds of quality rules instead of their own, as rule=low..high with either bound or both",
        section="own", reader=_READER,
    )  # fmt: skip
    perplexity_low: float = leaf(
        0.0, "Percentile of perplexity, by language, below which a document is dropped", section="9", unit="%",
        bounds=Bounds(ge=0, lt=100), reader=_READER,
    )  # fmt: skip
    perplexity_high: float = leaf(
        100.0, "Percentile of perplexity, by language, above which a document is dropped", section="9", unit="%",
        bounds=Bounds(gt=0, le=100), reader=_READER,
    )  # fmt: skip
    pii: Literal["off", "count", "scrub"] = leaf(
        "off", "Addresses, telephone and card numbers, keys: leave, count, or replace them", section="own",
        reader=_READER,
    )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Decontaminate(Section):
    """Training documents that share text with evaluation are dropped."""

    enabled: bool = leaf(True, "Compare training text with held-out documents and files", section="own", reader=_READER)
    ngram: int = leaf(13, "Words of an n-gram", unit="words", section="own", bounds=_AT_LEAST_ONE, reader=_READER)
    overlap: float = leaf(
        0.5, "Share of a document's n-grams found in evaluation text, or of an item's in it, from which it is dropped",
        section="own", bounds=Bounds(gt=0, le=1), reader=_READER,
    )  # fmt: skip
    files: tuple[str, ...] = leaf((), "More evaluation texts: .txt or .jsonl files", section="own", reader=_READER)


@dataclass(frozen=True, eq=False, repr=False)
class Mix(Section):
    """How often each domain is sampled."""

    by: Literal["source", "language"] = leaf("source", "What a domain is", section="own", reader=_READER)
    temperature: float = leaf(
        1.0, "T in p_d ~ weight_d * tokens_d^(1/T); 1 is proportional to size, larger is more even", section="9",
        bounds=_AT_LEAST_ONE, reader=_READER,
    )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Curriculum(Section):
    """Stages by length of sequence. A run trains the stage whose length is train.seq_len."""

    lengths: tuple[int, ...] = leaf(
        (), "Lengths of the stages, rising; empty: one stream of windows of any length", unit="tokens", section="9",
        reader=_READER,
    )  # fmt: skip
    short_share: float = leaf(
        0.35, "Share of each later stage's tokens that are documents of earlier stages' lengths", section="own",
        bounds=Bounds(ge=0, lt=1), reader=_READER,
    )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Tasks(Section):
    """Tasks made from the corpus and mixed into every stage."""

    retrieval: float = leaf(
        0.0, "Share of samples that are retrieval tasks", section="9", bounds=Bounds(ge=0, lt=0.5), reader=_READER
    )
    long_range: float = leaf(
        0.0, "Share of samples whose evidence lies beyond the window", section="9", bounds=Bounds(ge=0, lt=0.5),
        reader=_READER,
    )  # fmt: skip
    window: int = leaf(
        2048, "Tokens of local attention that long-range tasks are made for", unit="tokens", section="own",
        bounds=_AT_LEAST_ONE, reader=_READER,
    )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Workers(Section):
    """Who does the work; the result never depends on it."""

    kind: Literal["local", "slurm", "ray"] = leaf(
        "local", "Processes of this machine, a SLURM job array, or Ray", section="own", resume="free", reader=_READER
    )
    workers: int = leaf(
        0, "Processes, array jobs or Ray workers at a time; 0: as many as cores", section="own", bounds=Bounds(ge=0),
        resume="free", reader=_READER,
    )  # fmt: skip
    arguments: tuple[str, ...] = leaf(
        (), "Arguments of sbatch: partition, account, time", section="own", resume="free", reader=_READER
    )


@dataclass(frozen=True, eq=False, repr=False)
class Data(Section):
    """The data set a run builds and trains on. Where a user's own text lies is an argument of the command."""

    name: str = leaf("debian-docs", "Name of the data set, and of the default corpus", section="own", reader=_READER)
    sources: str | None = leaf(
        None, "YAML file that lists sources with path, licence, weight and schema", section="own",
        reader="training.dataset",
    )  # fmt: skip
    max_mb: float = leaf(
        24.0, "Raw text taken from the corpus at most", unit="MB", section="own", bounds=_POSITIVE, reader=_READER
    )
    max_bad_fraction: float = leaf(
        0.01, "Share of a source's entries that may be unreadable; above it the build stops", section="own",
        bounds=_SHARE, reader=_READER,
    )  # fmt: skip
    heldout_fraction: float = leaf(
        0.02, "Share of documents held out for evaluation, chosen by hash", section="own", bounds=Bounds(gt=0, lt=0.5),
        reader=_READER,
    )  # fmt: skip
    tokenizer_mb: float = leaf(
        8.0, "Text that a new tokenizer is trained on", unit="MB", section="own", bounds=_POSITIVE, reader=_READER
    )
    seed: int = leaf(
        0, "Seed of every choice while building the data set", section="own", bounds=Bounds(ge=0, lt=2**31),
        reader=_READER,
    )  # fmt: skip
    dedup: Dedup = branch(Dedup)
    filters: Filters = branch(Filters)
    decontaminate: Decontaminate = branch(Decontaminate)
    mix: Mix = branch(Mix)
    tasks: Tasks = branch(Tasks)
    curriculum: Curriculum = branch(Curriculum)
    engine: Workers = branch(Workers)
