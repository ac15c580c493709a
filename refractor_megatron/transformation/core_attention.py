"""Tri-tier attention as Megatron's ``core_attention`` sub-module (contract of ``DotProductAttention``)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..compat.megatron import MegatronModule, make_sharded_tensors_for_checkpoint, set_tensor_model_parallel_attributes
from ..distinction.gating import GATE_FEATURES, gate_features
from ..distinction.rules import CompiledRules
from ..fabric.attention import separate_attention, tri_tier_attention
from ..fabric.backends import AttentionInputs
from ..fabric.context_parallel import gather_summaries, local_shard, part_of, with_halos
from ..fabric.linear import linear_attention, linear_plan_for
from ..fabric.measure import AttentionProbe
from ..fabric.plan import plan_for
from ..fabric.positions import rotate_to
from ..fabric.retrieval import RetrievalBank
from ..fabric.summaries import pool, pool_level2
from .layer_plan import AttentionPlan


class TriTierCoreAttention(MegatronModule):
    """Local window, summaries and retrieved records under the compiled rules, or linear attention for long sequences.

    ``attention_mask`` carries the records of the whole sequence, int32 [b, L, 4 + R] = (document, segment, role, mask
    bits, ids of retrieved records): Megatron hands it through blocks, pipeline stages and activation recomputation
    untouched, and the rules turn it into a mask here. Tensor parallelism has already split the heads, so pooling per
    key/value head needs no communication.
    """

    #: Set while somebody measures attention (``fabric.measure``).
    probe: AttentionProbe | None = None

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
        bank: RetrievalBank | None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self" and (plan.mask.retrieved is None or bank is not None)
        self.plan, self.rules, self.bank, self.layer_number = plan, rules, bank, layer_number
        self.cp_group = pg_collection.cp
        self.part = part_of(self.cp_group)
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(plan.head_dim)
        self.inv_freq, self.rotary_scale = plan.rotary.frequencies()
        ranks, rank = pg_collection.tp.size(), pg_collection.tp.rank()
        self.kv_heads = plan.kv_heads // ranks
        self._add_summary_weights(plan)
        self._add_retrieval_weights(plan)
        self._add_gate_weights(plan, plan.heads // ranks)
        if plan.linear is not None:
            heads = range(rank * self.kv_heads, (rank + 1) * self.kv_heads)
            self.feature_map = plan.linear.feature_map(layer_number, heads, plan.head_dim, self.scale)

    def _add_summary_weights(self, plan: AttentionPlan) -> None:
        """Pooling queries [kv_heads, S, d] of each level."""
        summary = plan.mask.summary
        if summary is None or plan.pooling != "attn_pool":
            self.summary_query = self.group_query = None
            return
        shape = (self.kv_heads, summary.per_block, plan.head_dim)
        self.summary_query = self._weight(*shape)
        self.group_query = self._weight(*shape) if summary.levels == 2 else None

    def _add_retrieval_weights(self, plan: AttentionPlan) -> None:
        """Projections of a record's vector to the keys and values of all heads, [kv_heads · d, D]."""
        shape = (self.kv_heads * plan.head_dim, plan.record_dim)
        reads = plan.mask.retrieved is not None
        self.retrieved_key = self._weight(*shape) if reads else None
        self.retrieved_value = self._weight(*shape) if reads else None

    def _add_gate_weights(self, plan: AttentionPlan, heads: int) -> None:
        """Logits of a sigmoid for each head and tier: a bias, and weights of the token's gating features."""
        tiers = len(plan.mask.present)
        gated = plan.combine == "gated"
        self.tier_gate_bias = self._weight(heads, tiers) if gated else None
        self.tier_gate_weight = self._weight(heads, tiers, len(GATE_FEATURES)) if gated else None

    def _weight(self, *shape: int) -> torch.nn.Parameter:
        """A parameter that tensor parallelism splits by heads, its first dimension."""
        weight = torch.nn.Parameter(torch.zeros(*shape, dtype=self.config.params_dtype))
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
        return weight

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
            query: [s, b, heads / tp, d]; key, value: [s, b, kv_heads / tp, d], rotary positions already applied; s = L,
                or this context-parallel rank's share of it.
            attention_mask: records of the whole sequence, int32 [b, L, 4 + R]; in host memory, where masks are planned
                (on a device they work too, at the price of a copy and a wait).

        Returns:
            [s, b, heads / tp · d].
        """
        assert attention_bias is None and packed_seq_params is None
        s, b = query.shape[:2]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, heads, s, d]
        if self.plan.linear is not None:
            out = linear_attention(q, k, v, linear_plan_for(attention_mask, self.rules, q.device), self.feature_map)
        else:
            out = self._tri_tier(q, k, v, attention_mask)
        return out.permute(2, 0, 1, 3).reshape(s, b, -1)

    def _tri_tier(self, q: Tensor, k: Tensor, v: Tensor, records: Tensor) -> Tensor:
        spec, part = self.plan.mask, self.part
        policies = self.bank.policies if spec.retrieved is not None and self.bank is not None else None
        mask = plan_for(records, self.rules, spec, part, policies)
        far = [*self._summaries(k, v), *self._retrieved(records)]
        k_far, v_far = (torch.cat(parts, dim=2) if parts else None for parts in (far[::2], far[1::2]))
        if part.size > 1:
            k, v = with_halos(k, v, mask.space.halo, self.cp_group)
        x, joint = AttentionInputs(q, k, v, k_far, v_far), self.plan.combine == "joint"
        alone = [] if joint else [spec.only(tier) for tier in spec.present]
        executed = [mask] if joint else [plan_for(records, self.rules, tier, part, policies) for tier in alone]
        if self.probe is not None:
            self.probe.see(self.layer_number, x, mask, executed, self.scale, self.plan.backend)
        if joint:
            return tri_tier_attention(*x, mask, self.scale, self.plan.backend)
        return separate_attention(*x, executed, self._gates(records), self.scale, self.plan.backend)

    def _summaries(self, k: Tensor, v: Tensor) -> list[Tensor]:
        """Keys and values of both levels, those of level 2 first, each [b, kv_heads, n, d] of the whole sequence."""
        summary = self.plan.mask.summary
        if summary is None:
            return []
        length = k.shape[2] * self.part.size
        inv_freq = self._frequencies(k.device)
        kind, per_block, block = self.plan.pooling, summary.per_block, summary.block_size
        at, pooled = 0, []
        for start, stop in self.part.chunks(length):
            own = slice(at, at + stop - start)
            pooled.append(pool(kind, k[:, :, own], v[:, :, own], self.summary_query, per_block, block, inv_freq, start))
            at += stop - start
        k_1, v_1 = (torch.cat(parts, dim=2) for parts in zip(*pooled, strict=True))
        if self.part.size > 1:
            k_1, v_1 = gather_summaries(k_1, v_1, self.cp_group)
        if summary.levels == 1:
            return [k_1, v_1]
        k_2, v_2 = pool_level2(kind, k_1, v_1, self.group_query, per_block, summary.fanout, block, inv_freq)
        return [k_2, v_2, k_1, v_1]

    def _retrieved(self, records: Tensor) -> list[Tensor]:
        """Keys and values [b, kv_heads, chunks · R, d] of the records that this rank's chunks may read.

        A record's vector is data: gradients reach the projections and end there. A key stands at the first position of
        the chunk that reads it.
        """
        spec = self.plan.mask.retrieved
        if spec is None:
            return []
        assert self.bank is not None and self.retrieved_key is not None and self.retrieved_value is not None
        b, length = records.shape[:2]
        start = local_shard(torch.arange(length), 0, self.part)[:: spec.chunk]
        device = self.retrieved_key.device
        ids = records[:, start, 4:].to(device, torch.int64)  # [b, chunks, R]
        vectors = self.bank.vectors[ids.clamp(min=0)].to(self.retrieved_key.dtype)  # [b, chunks, R, D]
        shape = (b, -1, self.kv_heads, self.plan.head_dim)
        k, v = (
            (vectors @ weight.T).reshape(shape).transpose(1, 2) for weight in (self.retrieved_key, self.retrieved_value)
        )
        inv_freq = self._frequencies(k.device)
        k = rotate_to(k, start.to(device).repeat_interleave(spec.fan_in), inv_freq, self.rotary_scale)
        return [k, v]

    def _frequencies(self, device: torch.device) -> Tensor:
        """Angles per position on ``device``; no buffer, because ``module.bfloat16()`` would round it."""
        self.inv_freq = self.inv_freq.to(device)
        return self.inv_freq

    def _gates(self, records: Tensor) -> Tensor | None:
        """Weight of each tier's output, [tiers, b, heads, s, 1]; None where outputs are added up as they are."""
        if self.tier_gate_bias is None or self.tier_gate_weight is None:
            return None
        features = gate_features(local_shard(records, 1, self.part)).to(self.tier_gate_weight)  # [b, s, K_g]
        logits = torch.einsum("htk,bsk->tbhs", self.tier_gate_weight, features)
        return torch.sigmoid(logits + self.tier_gate_bias.T[:, None, :, None])[..., None]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Every weight here is split over tensor-parallel ranks by head (dimension 0)."""
        state = self.state_dict(prefix="", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, dict.fromkeys(state, 0), sharded_offsets
        )
        return sharded
