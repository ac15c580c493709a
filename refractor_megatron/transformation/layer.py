"""Megatron's transformer layer, whose router may read the token records."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..compat.megatron import TransformerLayer
from ..fabric.context_parallel import local_shard, part_of
from .router import RefractorRouter


class RefractorTransformerLayer(TransformerLayer):
    """Hands the records, which travel as ``attention_mask``, to the layer's router while forward runs.

    Full activation recomputation runs this forward again, records included, so the router sees them in both passes.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Megatron's layer forward.

        Args:
            hidden_states: [s, b, h], this rank's tokens: its context-parallel chunks, its sequence-parallel share.
            attention_mask: records int32 [b, L, >= 4] of the whole sequence.
        """
        router = getattr(self.mlp, "router", None)
        if not isinstance(router, RefractorRouter) or router.feature_weight is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        assert attention_mask is not None, "gating features come from the records"
        with router.lend_records(self._local(attention_mask, hidden_states.shape[0])):
            return super().forward(hidden_states, attention_mask, **kwargs)

    def _local(self, records: Tensor, length: int) -> Tensor:
        """The records of this rank's ``length`` tokens, [b, length, >= 4]."""
        records = local_shard(records, 1, part_of(self.pg_collection.cp))
        if not self.config.sequence_parallel:
            return records
        return records.narrow(1, self.pg_collection.tp.rank() * length, length)
