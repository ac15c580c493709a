"""Small models that a serving engine may run: tiers, roles, rules and experts in several combinations."""

from __future__ import annotations

from typing import Any

import torch

from refractor_megatron.hf.configuration_refractor import RefractorConfig
from refractor_megatron.hf.modeling_refractor import RefractorForCausalLM

LENGTH = 48
ROLE_TOKENS = {"system": 24, "user": 25, "assistant": 26, "tool": 27}
RULES = [{"name": "quiet", "when": {"role": "tool"}, "allow_read_from": ["system", "tool", "data"], "causal": True}]


def config_of(**changes: Any) -> RefractorConfig:
    """A small tri-tier mixture with roles and a rule."""
    values: dict[str, Any] = {
        "vocab_size": 30,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": LENGTH,
        "local_attention": {"window": 8},
        "summaries": {"block_size": 4, "per_block": 2, "levels": 2, "fanout": 2, "pooling": "attn_pool"},
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "mask_rules": RULES,
        "role_token_ids": ROLE_TOKENS,
        "end_token_id": 28,
        "eos_token_id": 29,
    }
    return RefractorConfig(**(values | changes))


def model_of(config: RefractorConfig) -> RefractorForCausalLM:
    """The model with weights large enough that every key matters."""
    torch.manual_seed(0)
    model = RefractorForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


VARIANTS: dict[str, dict[str, Any]] = {
    "two levels": {},
    "one level, gated": {
        "summaries": {"block_size": 4, "per_block": 1, "levels": 1, "fanout": 2, "pooling": "mean"},
        "combine": "gated",
        "router_gate_features": True,
    },
    "window of blocks, dense": {"num_experts": 0, "local_attention": {"kind": "block", "window": 8}, "summaries": None},
    "dilated": {"local_attention": {"kind": "hybrid", "window": 12, "unit": 2, "dilation": 2}},
    "no window": {"local_attention": None, "summaries": None, "mask_rules": []},
}
