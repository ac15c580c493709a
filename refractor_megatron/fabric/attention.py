"""The fabric's one entry: attention over [summaries | local] keys under a joint softmax."""

from __future__ import annotations

import torch

from refractor_megatron.fabric.backends import resolve
from refractor_megatron.fabric.plan import MaskPlan


def tri_tier_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_s: torch.Tensor | None,
    v_s: torch.Tensor | None,
    plan: MaskPlan,
    scale: float,
    backend: str = "auto",
) -> torch.Tensor:
    """out[b, h, L, d] = softmax over the legal keys of [summaries | tokens] of q · k * scale, times their values.

    q: [b, h, L, d]; k, v: [b, h_kv, L, d] with h % h_kv == 0 (query head i reads key head i // (h / h_kv));
    k_s, v_s: [b, h_kv, plan.n_summaries, d], None exactly when the plan has no summaries. Rows without a legal key are
    zero and counted in ``plan.stats``. Differentiable in q, k, v, k_s, v_s.
    Errors: ``CapabilityError`` when ``backend`` cannot serve this request (see ``backends.resolve``).
    """
    b, heads, length, d = q.shape
    assert k.shape == v.shape and k.shape[0] == b and k.shape[2:] == (length, d), (tuple(q.shape), tuple(k.shape))
    assert heads % k.shape[1] == 0, f"{heads} query heads over {k.shape[1]} key heads"
    assert (b, length) == (plan.layout.batch, plan.length), ((b, length), (plan.layout.batch, plan.length))
    if plan.n_summaries == 0:
        # A sequence shorter than one block has no summaries: empty tensors stand for "off".
        assert k_s is None or k_s.shape[2] == 0, "summaries given, but the plan has none"
        k_s = v_s = None
    else:
        assert k_s is not None and v_s is not None, f"the plan has {plan.n_summaries} summaries, none were given"
        assert k_s.shape == v_s.shape == (b, k.shape[1], plan.n_summaries, d), (tuple(k_s.shape), plan.n_summaries)
    return resolve(backend, q, k)(q, k, v, k_s, v_s, plan, scale)
