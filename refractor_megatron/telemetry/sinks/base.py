"""What the hub asks of an optional sink."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..registry import MetricValue


class Sink(Protocol):
    """An optional destination. All three methods run on one background thread; any exception disables the sink."""

    @property
    def name(self) -> str:
        """Word for messages, for example ``tensorboard``."""

    def open(self) -> None:
        """Import the library and create files; called once, before the first record."""

    def write(self, step: int, time_s: float, group: str, metrics: Mapping[str, MetricValue]) -> None:
        """Take one record. ``group`` prefixes the names (``train``, ``eval/raw``); ``time_s`` is Unix time."""

    def close(self) -> None:
        """Flush and release; called once, also after an empty run."""


def flatten(group: str, metrics: Mapping[str, MetricValue]) -> dict[str, float]:
    """Scalars named ``group/metric``; item i of a list becomes ``group/metric/00i`` so that names sort by index."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, list):
            width = max(2, len(str(len(value) - 1)))
            flat.update({f"{group}/{name}/{i:0{width}d}": float(item) for i, item in enumerate(value)})
        else:
            flat[f"{group}/{name}"] = float(value)
    return flat
