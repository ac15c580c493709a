"""The dense oracle: one masked softmax over all keys, gradients by autograd, any device and dtype."""

from __future__ import annotations

import torch

from refractor_megatron.distinction.intervals import IntArray
from refractor_megatron.distinction.rules import BoolTable
from refractor_megatron.fabric.backends.interface import AttentionInputs
from refractor_megatron.fabric.plan import MaskPlan


def dense_attention(x: AttentionInputs, plan: MaskPlan, scale: float) -> torch.Tensor:
    """An ``Attention``. Computed in float32 or wider; rows without a key give zeros."""
    q, k, v, k_far, v_far = x
    b, heads, length, d = q.shape
    kv_heads = k.shape[1]
    keys = k if k_far is None else torch.cat([k_far, k], dim=2)
    values = v if v_far is None else torch.cat([v_far, v], dim=2)
    legal = plan.dense(q.device)[:, None, None]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.reshape(b, kv_heads, heads // kv_heads, length, d).to(wide)
    scores = grouped @ keys.to(wide).unsqueeze(2).transpose(-1, -2) * scale
    # A finite floor instead of -inf: a row without keys would otherwise give NaN, forward and backward.
    scores = scores.masked_fill(~legal, torch.finfo(wide).min)
    weights = torch.softmax(scores, dim=-1).masked_fill(~legal, 0.0)
    return (weights @ values.to(wide).unsqueeze(2)).reshape(b, heads, length, d).to(q.dtype)


def dense_pairs(plan: MaskPlan, device: torch.device) -> int:
    """``Backend.visited_pairs``: every query with every key."""
    return len(plan.samples) * plan.length * (plan.n_far + plan.n_tokens)


def dense_edges(plan: MaskPlan, sample: int, rows: IntArray, device: torch.device) -> BoolTable:
    """``Backend.executed``: rows of the oracle's mask."""
    edges: BoolTable = plan.dense(device)[sample].cpu().numpy()[rows]
    return edges
