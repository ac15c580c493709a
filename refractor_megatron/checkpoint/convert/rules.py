"""How one Megatron tensor and its HF tensors become each other. Every ``join`` is the exact inverse of its ``split``.

Splits give views where rows stay together, so a converter that streams copies nothing until it writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from .buffers import New, fresh


class Rule(Protocol):
    """``split``: Megatron's tensor -> HF's, in the order of the table's entry; ``join``: back, bit for bit.

    ``new`` gives the memory for tensors that are no views of the given ones.
    """

    def split(self, tensor: Tensor, new: New = fresh) -> list[Tensor]:
        """HF tensors of a Megatron tensor."""

    def join(self, tensors: Sequence[Tensor], new: New = fresh) -> Tensor:
        """The Megatron tensor of these HF tensors."""


@dataclass(frozen=True)
class Same:
    """One tensor under two names."""

    def split(self, tensor: Tensor, new: New = fresh) -> list[Tensor]:
        """``[tensor]``."""
        return [tensor]

    def join(self, tensors: Sequence[Tensor], new: New = fresh) -> Tensor:
        """The only tensor."""
        (tensor,) = tensors
        return tensor


@dataclass(frozen=True)
class GroupedQkv:
    """Rows [q heads of group 0 | k | v | q heads of group 1 | k | v ...] <-> q [h·d, H], k and v [h_kv·d, H]."""

    heads: int
    kv_heads: int
    head_dim: int

    def split(self, tensor: Tensor, new: New = fresh) -> list[Tensor]:
        """[(h + 2·h_kv)·d, H] -> q, k, v."""
        per_group = self.heads // self.kv_heads
        groups = tensor.reshape(self.kv_heads, per_group + 2, self.head_dim, tensor.shape[1])
        parts = groups[:, :per_group], groups[:, per_group : per_group + 1], groups[:, per_group + 1 :]
        flat = []
        for part in parts:
            flat.append(new((math.prod(part.shape[:3]), tensor.shape[1]), tensor.dtype))
            flat[-1].view(part.shape).copy_(part)
        return flat

    def join(self, tensors: Sequence[Tensor], new: New = fresh) -> Tensor:
        """q, k, v -> [(h + 2·h_kv)·d, H]."""
        width = tensors[0].shape[1]
        groups = [part.reshape(self.kv_heads, -1, self.head_dim, width) for part in tensors]
        out = new((sum(len(part) for part in tensors), width), tensors[0].dtype)
        torch.cat(groups, dim=1, out=out.view(self.kv_heads, -1, self.head_dim, width))
        return out


@dataclass(frozen=True)
class Rows:
    """Consecutive rows, ``sizes`` of them: gate and up halves of a SwiGLU, true and padding rows of a vocabulary."""

    sizes: tuple[int, ...]

    def split(self, tensor: Tensor, new: New = fresh) -> list[Tensor]:
        """[sum(sizes), ...] -> one tensor for each size."""
        stops = list(accumulate(self.sizes))
        return [tensor[stop - size : stop] for stop, size in zip(stops, self.sizes, strict=True)]

    def join(self, tensors: Sequence[Tensor], new: New = fresh) -> Tensor:
        """The tensors on top of each other."""
        assert tuple(len(t) for t in tensors) == self.sizes, (tuple(len(t) for t in tensors), self.sizes)
        out = new((sum(self.sizes), *tensors[0].shape[1:]), tensors[0].dtype)
        return torch.cat(list(tensors), out=out)
