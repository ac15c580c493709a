"""What is known of every document without its text: a few tens of bytes each, from all shards of a build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.shards import Shard


@dataclass(frozen=True)
class Catalogue:
    """Rows of all shards one after another; row r of shard s has number ``first[s] + r``."""

    shards: tuple[Path, ...]
    first: npt.NDArray[np.int64]  # [shards + 1]
    ids: npt.NDArray[np.uint8]  # [n, 16]
    keys: npt.NDArray[np.uint8]  # [n, 16]
    groups: npt.NDArray[np.uint8]  # [n, 16], equal for the parts of one text
    sources: npt.NDArray[np.int64]  # [n]
    sizes: npt.NDArray[np.int64]  # [n], bytes of text

    @classmethod
    def of(cls, shards: Sequence[Path]) -> Catalogue:
        """Reads the columns of ``shards``. Raises ``DataError`` for a damaged one."""
        opened = [Shard(path) for path in shards]
        first = np.zeros(len(opened) + 1, dtype=np.int64)
        np.cumsum([len(one) for one in opened], out=first[1:])
        return cls(
            tuple(shards),
            first,
            np.concatenate([np.empty((0, 16), np.uint8), *(one.ids for one in opened)]),
            np.concatenate([np.empty((0, 16), np.uint8), *(one.keys for one in opened)]),
            np.concatenate([np.empty((0, 16), np.uint8), *(one.groups for one in opened)]),
            np.concatenate([np.empty(0, np.int64), *(one.numbers("source").astype(np.int64) for one in opened)]),
            np.concatenate([np.empty(0, np.int64), *(one.sizes for one in opened)]),
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def split(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """An array over all rows as one array for each shard."""
        return np.split(values, self.first[1:-1])

    def places(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(shard, row in the shard) int64 [m, 2] of row numbers [m]."""
        shard = np.searchsorted(self.first, rows, side="right") - 1
        return np.stack([shard, rows - self.first[shard]], axis=1)
