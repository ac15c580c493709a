"""What every source supplies, and what is counted while reading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.documents import Document


@dataclass
class Tally:
    """Counts of what reading met; they end in the manifest."""

    counts: Counter[str] = field(default_factory=Counter)
    unknown_tags: Counter[str] = field(default_factory=Counter)

    def text(self, data: bytes) -> None:
        """Counts a document whose bytes are not UTF-8 (they are kept as they are)."""
        try:
            data.decode()
        except UnicodeDecodeError:
            self.counts["invalid_utf8"] += 1


@dataclass(frozen=True)
class Source:
    """A named body of text with its licence. ``identity`` changes whenever its documents may change."""

    name: str
    version: str
    licence: str
    licence_file: str
    identity: dict[str, Any]
    read: Callable[[Tally], Iterator[Document]]
    sha256: str = ""
