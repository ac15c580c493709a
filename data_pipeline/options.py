"""What a build may be told. By default every document is kept that is no exact duplicate: presets say what to drop.

``refractor_megatron.config.data`` has the same keys for the command line, with their bounds; these are what the
pipeline's rooms take, so that they stand on their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Dedup:
    """Near-duplicates by MinHash-LSH, verified by exact Jaccard; paragraphs by hash.

    With b ``bands`` of r ``rows`` a pair of Jaccard J becomes a candidate with probability 1 - (1 - J^r)^b: 16 x 8 give
    .95 at J = .8 and .9999 at .9. Candidates below ``threshold`` are then rejected: it means what it says.
    """

    enabled: bool = False
    threshold: float = 0.7  # exact Jaccard of the sets of word n-grams
    ngram: int = 5  # words; characters in scripts without spaces, see dedup.shingles
    bands: int = 16
    rows: int = 8
    seed: int = 1
    paragraphs: bool = False  # drop paragraphs that stand in another document already


@dataclass(frozen=True)
class Filters:
    """Which documents are fit to train on. Signals are computed once and kept; these are only thresholds."""

    enabled: bool = False
    languages: tuple[str, ...] | None = None  # ISO 639-1 codes to keep; None: all
    language_score: float = 0.0  # least certainty of the language, 0..1
    quality: bool = True  # the named rules of filters.quality that are on by default
    rules_on: tuple[str, ...] = ()  # further rules
    rules_off: tuple[str, ...] = ()
    thresholds: tuple[str, ...] = ()  # "rule=low..high" instead of a rule's own; either bound may be left out
    perplexity_low: float = 0.0  # percentile band to keep, per language, 0..100
    perplexity_high: float = 100.0
    pii: Literal["off", "count", "scrub"] = "off"


@dataclass(frozen=True)
class Decontaminate:
    """Training documents that share text with evaluation: held-out documents, and files of the user's."""

    enabled: bool = False
    ngram: int = 13  # words
    overlap: float = 0.5  # share of a document's n-grams found in evaluation text, or of an item's in the document
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mix:
    """Shares of domains: p_d proportional to weight_d * tokens_d ** (1 / temperature)."""

    by: Literal["source", "language"] = "source"
    temperature: float = 1.0


@dataclass(frozen=True)
class Tasks:
    """Shares of every stage's samples that are made tasks, 0..1."""

    retrieval: float = 0.0
    long_range: float = 0.0
    window: int = 2048  # tokens of local attention; long-range evidence lies further back


@dataclass(frozen=True)
class Curriculum:
    """Stages by length of sequence. ``lengths`` empty: one stream of windows of any length over all documents."""

    lengths: tuple[int, ...] = ()  # tokens, rising
    short_share: float = 0.35  # of the tokens of each stage but the first that are documents of shorter stages


@dataclass(frozen=True)
class Engine:
    """Who does the work. Nothing here changes a byte of the result."""

    kind: Literal["local", "slurm", "ray"] = "local"
    workers: int = 0  # 0: as many as cores
    arguments: tuple[str, ...] = ()  # for sbatch: partition, account, time


@dataclass(frozen=True)
class Options:
    """A whole build."""

    name: str
    vocab_size: int
    max_mb: float
    heldout_fraction: float
    seed: int = 0
    max_bad_fraction: float = 0.01  # of a source's entries that may be quarantined
    tokenizer_mb: float = 8.0  # text that a new tokenizer is trained on
    dedup: Dedup = field(default_factory=Dedup)
    filters: Filters = field(default_factory=Filters)
    decontaminate: Decontaminate = field(default_factory=Decontaminate)
    mix: Mix = field(default_factory=Mix)
    tasks: Tasks = field(default_factory=Tasks)
    curriculum: Curriculum = field(default_factory=Curriculum)
    engine: Engine = field(default_factory=Engine)
