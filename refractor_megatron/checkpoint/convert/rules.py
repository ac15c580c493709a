"""How one Megatron tensor and its HF tensors become each other. Every ``join`` is the exact inverse of its ``split``.

Splits give views where rows stay together, so a converter that streams copies nothing until it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor


class Rule(Protocol):
    """``split``: Megatron's tensor -> HF's, in the order of the table's entry; ``join``: back, bit for bit."""

    def split(self, tensor: Tensor) -> list[Tensor]:
        """HF tensors of a Megatron tensor."""

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The Megatron tensor of these HF tensors."""


@dataclass(frozen=True)
class Same:
    """One tensor under two names."""

    def split(self, tensor: Tensor) -> list[Tensor]:
        """``[tensor]``."""
        return [tensor]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The only tensor."""
        (tensor,) = tensors
        return tensor


@dataclass(frozen=True)
class GroupedQkv:
    """Rows [q heads of group 0 | k | v | q heads of group 1 | k | v ...] <-> q [h·d, H], k and v [h_kv·d, H]."""

    heads: int
    kv_heads: int
    head_dim: int

    def split(self, tensor: Tensor) -> list[Tensor]:
        """[(h + 2·h_kv)·d, H] -> q, k, v."""
        per_group = self.heads // self.kv_heads
        groups = tensor.reshape(self.kv_heads, per_group + 2, self.head_dim, tensor.shape[1])
        parts = groups[:, :per_group], groups[:, per_group : per_group + 1], groups[:, per_group + 1 :]
        return [part.flatten(0, 2) for part in parts]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """q, k, v -> [(h + 2·h_kv)·d, H]."""
        width = tensors[0].shape[1]
        groups = [part.reshape(self.kv_heads, -1, self.head_dim, width) for part in tensors]
        return torch.cat(groups, dim=1).flatten(0, 2)


@dataclass(frozen=True)
class Rows:
    """Consecutive rows, ``sizes`` of them: gate and up halves of a SwiGLU, true and padding rows of a vocabulary."""

    sizes: tuple[int, ...]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """[sum(sizes), ...] -> one tensor for each size."""
        stops = list(accumulate(self.sizes))
        return [tensor[stop - size : stop] for stop, size in zip(stops, self.sizes, strict=True)]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors on top of each other."""
        assert tuple(len(t) for t in tensors) == self.sizes, (tuple(len(t) for t in tensors), self.sizes)
        return torch.cat(list(tensors))
