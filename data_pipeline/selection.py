"""Which documents a dataset holds: no duplicates, no blanks, a fair share of each source under the cap, two splits.

Every choice depends on content hashes and the seed, never on the order in which files were met.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass, field

from data_pipeline.documents import Document, cut_text, plain
from refractor_megatron.errors import DataError

#: A single document is cut into this many parts, so that some can be held out.
_PARTS_OF_ONE = 20


@dataclass(frozen=True, slots=True)
class Chosen:
    """A document with the index of its source and its place in the seeded hash order."""

    rank: bytes
    source: int
    document: Document


def _seeded(seed: int, purpose: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=16, key=seed.to_bytes(8, "little", signed=True), person=purpose).digest()


def water_level(sizes: list[int], cap: int) -> int:
    """Largest level L with sum(min(size, L)) <= cap: what every source may keep, in the units of ``sizes``."""
    left = cap
    for place, size in enumerate(sorted(sizes)):
        share = left // (len(sizes) - place)
        if size > share:
            return share
        left -= size
    return max(sizes, default=0)


@dataclass
class Selector:
    """Takes documents one by one and keeps what the cap allows.

    Under the cap everything is kept. Above it, each source keeps the documents that come first in the seeded hash
    order up to a common level (max-min fair share); then the next document of each source is added, in hash order,
    where the cap has room. The level only falls while documents come in, so what lies further above it can be let go
    at once: memory stays near the cap, plus one document a source, however large the corpus.
    """

    cap: int
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    _kept: list[list[Chosen]] = field(default_factory=list)
    _offered: list[int] = field(default_factory=list)
    _seen: set[bytes] = field(default_factory=set)
    _held: int = 0
    _trim_above: int = 0

    def add(self, source: int, document: Document) -> None:
        """Offers one document of source number ``source``."""
        while len(self._kept) <= source:
            self._kept.append([])
            self._offered.append(0)
        if document.blank:
            self.counts["blank"] += 1
            return
        if document.key in self._seen:
            self.counts["duplicate"] += 1
            return
        self._seen.add(document.key)
        self.counts["offered"] += 1
        self._offered[source] += document.size
        self._kept[source].append(Chosen(_seeded(self.seed, b"order", document.key), source, document))
        self._held += document.size
        if self._held > max(2 * self.cap, self._trim_above):
            self._kept = [below + crossing for below, crossing in self._by_level()]
            self._held = sum(one.document.size for chosen in self._kept for one in chosen)
            self._trim_above = 2 * self._held

    @property
    def read_mb(self) -> float:
        """Text offered so far, in units of 10^6 bytes."""
        return sum(self._offered) / 1e6

    def _by_level(self) -> list[tuple[list[Chosen], list[Chosen]]]:
        """For each source, the documents up to the present level, and the one that crosses it, if any."""
        level = water_level(self._offered, self.cap)
        halves = []
        for kept in self._kept:
            chosen = sorted(kept, key=lambda one: one.rank)
            totals = itertools.accumulate(one.document.size for one in chosen)
            place = next((place for place, total in enumerate(totals) if total > level), len(chosen))
            halves.append((chosen[:place], chosen[place : place + 1]))
        return halves

    def finish(self) -> list[Chosen]:
        """The chosen documents of all sources in the seeded hash order; at least two.

        A lone plain document is cut into parts at line ends. Raises ``DataError`` if nothing usable came in.
        """
        halves = self._by_level()
        chosen = [one for below, _ in halves for one in below]
        room = self.cap - sum(one.document.size for one in chosen)
        for one in sorted((one for _, crossing in halves for one in crossing), key=lambda one: one.rank):
            if one.document.size <= room:
                chosen.append(one)
                room -= one.document.size
        chosen.sort(key=lambda one: one.rank)
        self.counts["over_cap"] = self.counts["offered"] - len(chosen)
        if len(chosen) == 1 and not chosen[0].document.framed:
            chosen = self._cut_single(chosen[0])
        if len(chosen) < 2:
            self._refuse(len(chosen))
        return chosen

    def _cut_single(self, only: Chosen) -> list[Chosen]:
        limit = max(8, -(-only.document.size // _PARTS_OF_ONE))
        text, provenance = only.document.parts[0].data, only.document.provenance
        parts = {part: plain(part, provenance) for part in cut_text(text, limit) if not part.isspace()}
        self.counts["cut"] += len(parts) - 1
        chosen = [Chosen(_seeded(self.seed, b"order", part.key), only.source, part) for part in parts.values()]
        return sorted(chosen, key=lambda one: one.rank)

    def _refuse(self, found: int) -> None:
        if self.counts["over_cap"]:
            raise DataError(
                f"data.max_mb ({self.cap / 1e6:g} MB) leaves {found} usable documents "
                f"of {self.counts['offered']}; raise it."
            )
        raise DataError(
            f"The corpus has {found} usable documents ({self.counts['blank']} blank and {self.counts['duplicate']} "
            "duplicate ones were skipped), but training and held-out text need one each; add text."
        )


def split_heldout(chosen: list[Chosen], fraction: float, seed: int) -> tuple[list[Chosen], list[Chosen]]:
    """``(train, heldout)``, both non-empty and in the given order; a document's side depends on its hash and ``seed``.

    If the fraction leaves one side empty, the document nearest to the boundary changes sides.
    """
    draw = {
        one.rank: int.from_bytes(_seeded(seed, b"heldout", one.document.key)[:8], "little") / 2**64 for one in chosen
    }
    heldout = {rank for rank, value in draw.items() if value < fraction}
    if not heldout:
        heldout = {min(draw, key=lambda rank: draw[rank])}
    elif len(heldout) == len(draw):
        heldout.remove(max(draw, key=lambda rank: draw[rank]))
    return [c for c in chosen if c.rank not in heldout], [c for c in chosen if c.rank in heldout]
