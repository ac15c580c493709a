"""Tri-tier attention as Megatron's ``core_attention`` sub-module (contract of ``DotProductAttention``)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..compat.megatron import MegatronModule, make_sharded_tensors_for_checkpoint, set_tensor_model_parallel_attributes
from ..distinction.rules import CompiledRules
from ..fabric.attention import tri_tier_attention
from ..fabric.plan import plan_for
from ..fabric.summaries import attn_pool
from .layer_plan import AttentionPlan


class TriTierCoreAttention(MegatronModule):
    """Local window and attention-pooled summaries under one joint softmax, legal edges only.

    ``attention_mask`` carries the token records, int32 [b, s, 4] = (document, segment, role, mask bits): Megatron hands
    it through blocks, pipeline stages and activation recomputation untouched, and the rules turn it into a mask here.
    Tensor parallelism has already split the heads, so pooling per key/value head needs no communication.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        plan: AttentionPlan,
        rules: CompiledRules,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self" and config.context_parallel_size == 1
        self.plan, self.rules = plan, rules
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(plan.head_dim)
        if plan.summaries_per_block:
            kv_heads = plan.kv_heads // config.tensor_model_parallel_size
            self.summary_query = torch.nn.Parameter(
                torch.zeros(kv_heads, plan.summaries_per_block, plan.head_dim, dtype=config.params_dtype)
            )
            set_tensor_model_parallel_attributes(self.summary_query, is_parallel=True, dim=0, stride=1)
            half = torch.arange(0, plan.rotary_dim, 2, dtype=torch.float32)
            # Megatron divides positions by its interpolation factor; alpha scales them the same way
            self.inv_freq = plan.rotary_alpha / plan.rotary_theta ** (half / plan.rotary_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **unused: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads / tp, d]; key, value: [s, b, kv_heads / tp, d], rotary positions already applied.
            attention_mask: token records int32 [b, s, 4].

        Returns:
            [s, b, heads / tp · d].
        """
        assert attention_bias is None and packed_seq_params is None
        s, b = query.shape[:2]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, heads, s, d]
        mask = plan_for(
            attention_mask, self.rules, self.plan.window, self.plan.block_size, self.plan.summaries_per_block
        )
        k_sum = v_sum = None
        if self.plan.summaries_per_block:
            inv_freq = self.inv_freq.to(k.device)
            k_sum, v_sum = attn_pool(k, v, self.summary_query, self.plan.block_size, inv_freq)
        out = tri_tier_attention(q, k, v, k_sum, v_sum, mask, self.scale, self.plan.backend)  # [b, heads, s, d]
        return out.permute(2, 0, 1, 3).reshape(s, b, -1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The pooling queries are split over tensor-parallel ranks by head (dimension 0)."""
        state = self.state_dict(prefix="", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, {"summary_query": 0} if "summary_query" in state else {}, sharded_offsets
        )
        return sharded
