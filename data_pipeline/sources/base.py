"""What every source supplies: plain data, so that another process, or another host, can read a part of it.

A source is a list of units. A unit says what to read in JSON values; under ``place`` it says where that lies on this
machine, which is the one thing about it that does not determine the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from data_pipeline.documents import PART_BYTES

if TYPE_CHECKING:
    from data_pipeline.shards import Located

#: One task's share of a source; see ``units.read_unit`` for its fields.
Unit = dict[str, Any]
#: Input that one task should have at most, if its files can be divided (bytes).
UNIT_BYTES = 24 << 20
#: A line, a page or a cell that is longer is quarantined without being read into memory whole (10^6 bytes).
MAX_LINE_MB = 64.0
_SAMPLE_BYTES = 200


@dataclass
class Reading:
    """One pass over a unit: its limits (bytes), and counts of what was read.

    ``entries``: documents as their author wrote them; ``cut_parts``: the further parts of those that were cut.
    """

    part_bytes: int = PART_BYTES
    max_line: int = int(MAX_LINE_MB * 1e6)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An entry that cannot be understood: where it stands, why, and its first bytes."""

    file: int
    position: int
    reason: str
    detail: str
    sample: bytes = b""


Item: TypeAlias = "Located | Quarantined"


class Bad(Exception):
    """An entry that belongs into quarantine, raised where its place is not known."""

    def __init__(self, reason: str, detail: str, size: int = 0) -> None:
        """``size``: bytes of the entry, where it is large for one entry among many."""
        super().__init__(detail)
        self.reason, self.detail, self.size = reason, detail, size

    def at(self, file: int, position: int, sample: bytes = b"") -> Quarantined:
        """The record of it."""
        return Quarantined(file, position, self.reason, self.detail, sample[:_SAMPLE_BYTES])


@dataclass(frozen=True)
class Source:
    """A named body of text with its licence. ``identity`` changes whenever its documents may change.

    ``files``: {"path", "sha256", "bytes"} each; a document's file number counts in this list. ``weight``: its share in
    the mix against others of its size. ``mendable``: it is the user's own, who can correct what is quarantined.
    ``fetched``: ISO 8601 time at which it came here, if that is known.
    """

    name: str
    version: str
    licence: str
    licence_file: str
    identity: dict[str, Any]
    units: tuple[Unit, ...]
    weight: float = 1.0
    schema: dict[str, Any] | None = None
    fetched: str | None = None
    files: tuple[dict[str, Any], ...] = ()
    sha256: str = ""
    mendable: bool = True

    @property
    def megabytes(self) -> float:
        """Estimated text, in units of 10^6 bytes."""
        return float(sum(unit["megabytes"] for unit in self.units))


def grouped(sizes: list[int], limit: int = UNIT_BYTES) -> Iterator[range]:
    """Consecutive runs of ``sizes`` of at most ``limit`` together; a larger one stands alone."""
    start = held = 0
    for place, size in enumerate(sizes):
        if place > start and held + size > limit:
            yield range(start, place)
            start, held = place, 0
        held += size
    if start < len(sizes):
        yield range(start, len(sizes))
