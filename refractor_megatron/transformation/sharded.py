"""A model's parameters as global tensors: which slice of which named tensor this rank holds.

Megatron's ``sharded_state_dict`` knows the global shape and offset of every local tensor on every grid. Initialisation,
EMA, checkpoints and grid-parity checks all go through this one view, so none of them knows about TP, PP or EP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..compat.megatron import ShardedTensor, ShardedTensorFactory, apply_factories, nested_values

#: Layer index in the key, not in the shape: layers may differ, and a pipeline stage is then just a subset of keys. Give
#: upstream a copy: it writes its groups into it.
SHARDING = {"non_homogeneous_layers": True}


@dataclass(frozen=True)
class Shard:
    """A local piece of a global tensor."""

    key: str
    global_shape: tuple[int, ...]
    index: tuple[slice, ...]  # where the piece lies; leading axes of size one are not in ``data``
    data: Tensor  # a view of the local tensor
    is_main: bool  # of all ranks that hold this piece, the one that speaks for it


def sharded_tensors(model: Any, substitute: Mapping[int, Tensor] | None = None) -> dict[str, Any]:
    """Sharded state dict of one pipeline stage; ``substitute`` swaps a parameter's data by ``id(parameter)``.

    With ``substitute`` only the parameters named there are kept: EMA holds a part, buffers have no gradient.
    """
    state: dict[str, Any] = model.sharded_state_dict(metadata=dict(SHARDING))
    state = {k: v for k, v in state.items() if isinstance(v, ShardedTensor | ShardedTensorFactory)}
    if substitute is None:
        return state
    kept = {}
    for name, entry in state.items():
        if id(entry.data) in substitute:
            entry.data = substitute[id(entry.data)]
            kept[name] = entry
    return kept


def shards(model: Any, of: Callable[[Tensor], Tensor] = lambda p: p.data) -> Iterator[Shard]:
    """Every local parameter piece; ``of(parameter)`` chooses weight, gradient, ... of the same shape."""
    parameters = list(model.parameters())
    state = sharded_tensors(model, {id(p): of(p) for p in parameters})
    apply_factories(state)
    for entry in nested_values(state):
        replica = entry.replica_id if isinstance(entry.replica_id, tuple) else (entry.replica_id,)
        yield Shard(entry.key, tuple(entry.global_shape), entry.global_slice(), entry.data, not any(replica))
