"""The fabric's entry: attention over [far | tokens] keys, under one softmax or one for each tier."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from refractor_megatron.fabric.backends import AttentionInputs, resolve
from refractor_megatron.fabric.plan import MaskPlan


def tri_tier_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_far: torch.Tensor | None,
    v_far: torch.Tensor | None,
    plan: MaskPlan,
    scale: float,
    backend: str = "auto",
) -> torch.Tensor:
    """out[b, h, s, d] = softmax over the legal keys of [far | tokens] of q · k * scale, times their values.

    Shapes as in ``AttentionInputs``; far keys may be empty instead of None. Rows without a legal key are zero and
    counted in ``plan.stats``. Differentiable in q, k, v, k_far, v_far.
    Errors: ``CapabilityError`` when ``backend`` cannot serve this request (see ``backends.resolve``).
    """
    b, heads, rows, d = q.shape
    kv_heads = k.shape[1]
    assert k.shape == v.shape == (b, kv_heads, plan.n_tokens, d), (tuple(q.shape), tuple(k.shape), plan.n_tokens)
    assert heads % kv_heads == 0, f"{heads} query heads over {kv_heads} key heads"
    assert (b, rows) == (len(plan.samples), plan.length), ((b, rows), (len(plan.samples), plan.length))
    if plan.n_far == 0:
        # A sequence shorter than one block has no summaries: empty tensors stand for "off".
        assert k_far is None or k_far.shape[2] == 0, "far keys given, but the plan has none"
        k_far = v_far = None
    else:
        assert k_far is not None and v_far is not None, f"the plan has {plan.n_far} far keys, none were given"
        assert k_far.shape == v_far.shape == (b, kv_heads, plan.n_far, d), (tuple(k_far.shape), plan.n_far)
    x = AttentionInputs(q, k, v, k_far, v_far)
    return resolve(backend, x)(x, plan, scale)


def separate_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_far: torch.Tensor | None,
    v_far: torch.Tensor | None,
    plans: Sequence[MaskPlan],
    gates: torch.Tensor | None,
    scale: float,
    backend: str = "auto",
) -> torch.Tensor:
    """Sum over tiers of gate · softmax over that tier's keys alone (``relation.combine``: sum, gated).

    plans: one for each tier (``MaskSpec.only``); gates: [tiers, b, h, s, 1], None for a plain sum (spec section 13.1).
    With gates equal to the softmax over tiers of their log-sum-exps it is the joint attention. A tier without keys for
    a row adds nothing to it. Other arguments and errors as in ``tri_tier_attention``.
    """
    parts = [tri_tier_attention(q, k, v, k_far, v_far, plan, scale, backend) for plan in plans]
    if gates is not None:
        parts = [part * gate.to(part.dtype) for part, gate in zip(parts, gates, strict=True)]
    return torch.stack(parts).sum(0)
