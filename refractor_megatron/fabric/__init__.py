"""Tri-tier attention: local window, attention-pooled summaries and (later) retrieved keys under one joint softmax."""

from refractor_megatron.fabric.attention import tri_tier_attention
from refractor_megatron.fabric.plan import MaskPlan, plan_for
from refractor_megatron.fabric.summaries import attn_pool, rotate_to_centre

__all__ = ["MaskPlan", "attn_pool", "plan_for", "rotate_to_centre", "tri_tier_attention"]
