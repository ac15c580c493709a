"""Initialisation by name: every grid starts from the same weights, bit for bit.

Each global tensor is drawn from a generator seeded by (seed, its checkpoint key) and every rank keeps its slice.
Megatron's own scheme depends on how many tensors a stage builds before: two pipeline stages start elsewhere than one.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch

from .layer_plan import LayerPlan
from .sharded import shards

#: Projections that write into the residual stream: scaled by 1/sqrt(2 · layers), as in GPT-2 and Megatron.
RESIDUAL_WRITERS = ("linear_proj.weight", "linear_fc2.weight")
#: Start at zero: a role is what training makes of it, and a model without roles is the same model at step 0.
ZERO = ("tokentype_embeddings.weight", "tier_gate_bias", "tier_gate_weight", "router.feature_weight")


def seed_of(seed: int, key: str) -> int:
    """63-bit seed of one named tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "little") >> 1


@torch.no_grad()
def initialise(model: Any, plan: LayerPlan, seed: int) -> None:
    """Fill every parameter: norms with 1, role table and gates with 0, others with N(0, std²)."""
    for shard in shards(model):
        if "norm" in shard.key:
            shard.data.fill_(1.0)
            continue
        if shard.key.endswith(ZERO):
            shard.data.zero_()
            continue
        std = plan.init_std
        if shard.key.endswith(RESIDUAL_WRITERS):
            std /= math.sqrt(2 * plan.n_layers)
        generator = torch.Generator().manual_seed(seed_of(seed, shard.key))
        full = torch.empty(shard.global_shape).normal_(0.0, std, generator=generator)
        shard.data.copy_(full[shard.index].reshape(shard.data.shape))
