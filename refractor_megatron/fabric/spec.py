"""What a layer's mask is made of: the geometry of the three tiers, and the part of a sequence that one rank holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from refractor_megatron.distinction.pattern import LocalPattern

Tier = Literal["summary", "retrieved", "local"]
ALL_TIERS: frozenset[Tier] = frozenset({"summary", "retrieved", "local"})


@dataclass(frozen=True)
class SummarySpec:
    """Tier B: S summaries for each block; ``levels=2`` adds S for each group of ``fanout`` blocks.

    A summary is visible to a query when it is complete, every token in it is legal for the query, and the local tier
    does not read all of it anyway. With two levels a group stands in for its blocks once it lies at least one whole
    group behind the query's own; where a group may not be read as a whole, its readable blocks remain.
    """

    block_size: int
    per_block: int
    levels: int = 1
    fanout: int = 16

    def counts(self, length: int) -> tuple[int, int]:
        """(level-2, level-1) summary keys of a sample."""
        groups = length // (self.block_size * self.fanout) if self.levels == 2 else 0
        return groups * self.per_block, length // self.block_size * self.per_block


@dataclass(frozen=True)
class RetrievedSpec:
    """Tier C: a chunk of tokens reads the ``fan_in`` records that the chunk before it retrieved (RETRO's shift)."""

    chunk: int
    fan_in: int

    def count(self, length: int) -> int:
        """Retrieved keys of a sample."""
        return -(-length // self.chunk) * self.fan_in


@dataclass(frozen=True)
class MaskSpec:
    """Geometry of one layer's attention; hashable, so that layers of equal spec share a plan.

    ``tiers`` restricts the readable keys to some tiers, for attention whose tiers have softmaxes of their own; the
    key space stays the same.
    """

    local: LocalPattern = field(default_factory=LocalPattern)
    summary: SummarySpec | None = None
    retrieved: RetrievedSpec | None = None
    tiers: frozenset[Tier] = ALL_TIERS

    def only(self, tier: Tier) -> MaskSpec:
        """The same geometry with one tier's keys readable."""
        return MaskSpec(self.local, self.summary, self.retrieved, frozenset({tier}))

    @property
    def present(self) -> tuple[Tier, ...]:
        """Tiers that have keys, in the order of the key space."""
        far: list[Tier] = ["summary"] if self.summary is not None else []
        far += ["retrieved"] if self.retrieved is not None else []
        return (*far, "local")


@dataclass(frozen=True)
class ContextPart:
    """Context-parallel rank ``rank`` of ``size``: chunks rank and 2·size-1-rank of 2·size (Megatron's zig-zag)."""

    rank: int = 0
    size: int = 1

    def chunks(self, length: int) -> tuple[tuple[int, int], ...]:
        """Token ranges [start, stop) that the rank holds, in the order it holds them; the whole for one rank."""
        if self.size == 1:
            return ((0, length),)
        assert length % (2 * self.size) == 0, (length, self.size)
        part = length // (2 * self.size)
        return tuple((c * part, (c + 1) * part) for c in (self.rank, 2 * self.size - 1 - self.rank))


WHOLE = ContextPart()
