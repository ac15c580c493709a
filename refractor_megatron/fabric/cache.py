"""Caches of what is compiled from a batch's records: small, and keyed by the memory the records lie in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

_Value = TypeVar("_Value")

#: Plans kept: a few geometries for each of the micro-batches in flight in one pipeline stage of a common schedule.
PLANS_KEPT = 32


class Lru(Generic[_Value]):
    """Least-recently-used dictionary of fixed size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: OrderedDict[Hashable, _Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """The value of ``key``, made on a miss."""
        if key in self.items:
            self.items.move_to_end(key)
        else:
            self.items[key] = make()
            if len(self.items) > self.size:
                self.items.popitem(last=False)
        return self.items[key]

    def of_records(self, records: torch.Tensor, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """``get`` by the identity of the records' memory (address, shape, version counter) and ``key``.

        Detached aliases, as activation recomputation makes them, hit; writing into the records through torch misses.
        Writing behind torch's back, through a numpy array that shares the memory, is not seen: give each batch its own
        records. The value must hold the records, so that their memory is not reused under a cached key. Inference
        tensors have no version counter, hence no way to see a write, and are not cached.
        """
        assert records.dim() == 3 and records.shape[2] >= 4 and min(records.shape) > 0, tuple(records.shape)
        assert not records.is_floating_point(), records.dtype
        if records.is_inference():
            return make()
        place = (records.device, records.data_ptr(), tuple(records.shape), records.stride(), records.dtype)
        return self.get((place, records._version, key), make)
