"""Tri-tier attention: local window, attention-pooled summaries and retrieved keys under one joint softmax."""

from refractor_megatron.fabric.attention import tri_tier_attention
from refractor_megatron.fabric.plan import MaskPlan, plan_for
from refractor_megatron.fabric.summaries import pool, pool_level2

__all__ = ["MaskPlan", "plan_for", "pool", "pool_level2", "tri_tier_attention"]
