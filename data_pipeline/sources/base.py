"""What every source supplies, and what is limited and counted while reading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.documents import PART_BYTES, Document


@dataclass
class Reading:
    """One pass over sources: the longest plain document it may yield (bytes), and counts that end in the manifest."""

    part_bytes: int = PART_BYTES
    counts: Counter[str] = field(default_factory=Counter)

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
    read: Callable[[Reading], Iterator[Document]]
    sha256: str = ""
