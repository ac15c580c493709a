"""What a store of chunks did and holds."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Errors:
    """Errors measured on encoded tensors, in the metric of their codec."""

    tensors: int = 0
    mean: float = 0.0
    maximum: float = 0.0

    def with_one(self, error: float) -> Errors:
        """These and another."""
        n = self.tensors + 1
        return Errors(n, self.mean + (error - self.mean) / n, max(self.maximum, error))


@dataclass(frozen=True)
class Age:
    """Of one chunk: tokens between its end and the newest one, and accesses to the store since its last one."""

    tokens: int
    idle: int


@dataclass
class Counters:
    """Running counts. Hits and misses are chunks touched by ``get``; evictions are chunks, of all layers each."""

    puts: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    escalations: int = 0  # tensors whose codec missed its bound
    by_codec: dict[str, Errors] = field(default_factory=dict)

    def encoded_as(self, codec: str, error: float, escalated: bool) -> None:
        """Count one encoded tensor."""
        self.by_codec[codec] = self.by_codec.get(codec, Errors()).with_one(error)
        self.escalations += escalated


@dataclass(frozen=True)
class Statistics:
    """Counts since the store was made, and what it holds now."""

    puts: int
    hits: int
    misses: int
    evictions: int
    escalations: int
    by_codec: dict[str, Errors]
    chunks: int  # positions in chunks, all layers of a chunk as one
    raw: int  # chunks by layer
    encoded: int
    nbytes: int
    bits_per_value: float | None  # of the encoded chunks held; None without any
    ages: dict[int, Age]  # by chunk id

    @property
    def compression_ratio(self) -> float | None:
        """Size of the encoded chunks relative to fp16, headers included (``memory.kv.compress_ratio``)."""
        return None if self.bits_per_value is None else self.bits_per_value / 16

    @property
    def hit_rate(self) -> float | None:
        """Share of touched chunks that were here; None before the first access."""
        touched = self.hits + self.misses
        return self.hits / touched if touched else None
