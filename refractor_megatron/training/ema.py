"""Exponential moving average of the weights, sharded over data-parallel ranks.

Model-parallel ranks hold the average of their own shards only. Within a data-parallel group every parameter has one
owner, chosen by size, so the average costs 4 / dp bytes for each local parameter and its update is shared out as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ..compat.megatron import ShardedTensor, ShardedTensorFactory, parallel_state
from ..transformation.sharded import sharded_tensors


class WeightEMA:
    """avg ← decay · avg + (1 - decay) · weight after every update, in fp32 (spec section 5).

    The decay is warmed up as min(decay, (1 + t) / (10 + t)), so that short runs do not average their initialisation.
    """

    def __init__(self, model: Any, decay: float) -> None:
        self.model, self.decay = model, decay
        self.owner: dict[str, int] = {}
        self.average: dict[str, Tensor] = {}
        load: dict[Any, list[int]] = {}
        for name, parameter in model.named_parameters():
            group = _group(parameter)
            held = load.setdefault(group, [0] * group.size())
            owner = held.index(min(held))
            held[owner] += parameter.numel()
            self.owner[name] = owner
            if owner == group.rank():
                self.average[name] = parameter.detach().float().clone()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Fold in the weights after update ``step`` (1-based), from the optimizer's fp32 masters where it keeps any."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.model.named_parameters():
            if name in self.average:
                master = getattr(parameter, "main_param", parameter)
                self.average[name].lerp_(master.detach().float(), 1.0 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Evaluate with the averaged weights; no second full copy is made.

        Owners exchange weight and average, the others take the average from the owner and, on leaving, the weight.
        """
        exact = self._exchange()
        try:
            yield
        finally:
            self._exchange(exact)

    @torch.no_grad()
    def _exchange(self, keep: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Swap owned tensors with the model and broadcast; returns the exact averages that were rounded, if any."""
        exact: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            group = _group(parameter)
            if name in self.average:
                held = self.average[name]
                self.average[name] = parameter.detach().float().clone() if keep is None else keep[name]
                exact[name] = held
                parameter.data.copy_(held)
            if group.size() > 1:
                dist.broadcast(parameter.data, dist.get_global_rank(group, self.owner[name]), group=group)
        return exact

    def sharded_state(self) -> dict[str, Any]:
        """Sharded tensors under the key prefix ``ema.``; each is written by its owner."""
        owned = {id(p): self.average[n] for n, p in self.model.named_parameters() if n in self.average}
        state = sharded_tensors(self.model, owned)
        for entry in state.values():
            entry.key = f"ema.{entry.key}"
            assert isinstance(entry, ShardedTensor | ShardedTensorFactory)
            entry.replica_id = _as_main(entry.replica_id)
        return {f"ema.{name}": entry for name, entry in state.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take the averages that ``sharded_state`` asked for."""
        for name, average in self.average.items():
            average.copy_(state[f"ema.{name}"])


def _group(parameter: Parameter) -> Any:
    """The group whose ranks hold copies of this parameter and average its gradient."""
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_group()


def _as_main(replica_id: Any) -> Any:
    """The same replica id with its data-parallel component cleared: the owner speaks for the group."""
    return (*replica_id[:-1], 0) if isinstance(replica_id, tuple) else 0
