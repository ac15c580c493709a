"""Tiers with softmaxes of their own: plain sum, gates, and the gates that give the joint attention back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.fabric.attention import separate_attention, tri_tier_attention
from refractor_megatron.fabric.plan import MaskPlan, plan_for
from refractor_megatron.fabric.spec import MaskSpec, RetrievedSpec, SummarySpec

LENGTH, SCALE = 96, 0.25
SPEC = MaskSpec(LocalPattern(window=16), SummarySpec(8, 2), RetrievedSpec(16, 3))
RULES = compile_rules([{"name": "sealed", "when": {"bits": ["SAFETY_SCOPE"]}, "allow_write_to": []}])
POLICIES = np.array([3, 1], dtype=np.uint8)


def inputs() -> tuple[list[torch.Tensor], torch.Tensor]:
    records = torch.zeros(2, LENGTH, 7, dtype=torch.int32)
    records[:, :, 2] = 5
    records[0, 40:50, 3] = 8
    records[1, 30:, 0] = 1
    records[..., 6] = -1
    records[..., 5] = 1
    space = plan_for(records, RULES, SPEC, policies=POLICIES)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, LENGTH, 16), *[(2, 2, LENGTH, 16)] * 2, *[(2, 2, space.n_far, 16)] * 2]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes], records


def log_sum_exp(q: torch.Tensor, k: torch.Tensor, k_far: torch.Tensor, plan: MaskPlan) -> torch.Tensor:
    """[b, h, rows, 1], -inf where a row has no key; naive."""
    keys = torch.cat([k_far, k], 2).repeat_interleave(2, 1)
    scores = (q @ keys.transpose(-1, -2)) * SCALE
    return scores.masked_fill(~plan.dense(q.device)[:, None], float("-inf")).logsumexp(-1, keepdim=True)


@pytest.mark.parametrize("backend", ["dense", "blocksparse_cpu"])
def test_gates_equal_to_the_shares_of_the_tiers_give_the_joint_attention(backend: str) -> None:
    (q, k, v, k_far, v_far), records = inputs()
    joint = tri_tier_attention(q, k, v, k_far, v_far, plan_for(records, RULES, SPEC, policies=POLICIES), SCALE, backend)
    plans = [plan_for(records, RULES, SPEC.only(tier), policies=POLICIES) for tier in SPEC.present]
    shares = torch.softmax(torch.stack([log_sum_exp(q, k, k_far, plan) for plan in plans]), 0)
    gated = separate_attention(q, k, v, k_far, v_far, plans, shares, SCALE, backend)
    assert (gated - joint).abs().max() <= 1e-12
    # The shares are functions of q and k, so the gradients agree as well.
    weight = torch.randn(joint.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad((gated * weight).sum(), [q, k, v, k_far, v_far])
    theirs = torch.autograd.grad((joint * weight).sum(), [q, k, v, k_far, v_far])
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) <= 1e-12


def test_the_sum_adds_one_attention_for_each_tier() -> None:
    (q, k, v, k_far, v_far), records = inputs()
    plans = [plan_for(records, RULES, SPEC.only(tier), policies=POLICIES) for tier in SPEC.present]
    out = separate_attention(q, k, v, k_far, v_far, plans, None, SCALE)
    expected = torch.zeros_like(out)
    keys, values = (torch.cat(pair, 2).repeat_interleave(2, 1) for pair in ((k_far, k), (v_far, v)))
    mask = plan_for(records, RULES, SPEC, policies=POLICIES).dense(q.device)[:, None]
    for lo, hi in plan_for(records, RULES, SPEC, policies=POLICIES).tiers.values():
        scores = (q @ keys[:, :, lo:hi].transpose(-1, -2)) * SCALE
        weights = scores.masked_fill(~mask[..., lo:hi], float("-inf")).softmax(-1).nan_to_num(0.0)
        expected = expected + weights @ values[:, :, lo:hi]
    assert (out - expected).abs().max() <= 1e-12


def test_a_tier_alone_has_the_keys_of_that_tier() -> None:
    (q, *_), records = inputs()
    whole = plan_for(records, RULES, SPEC, policies=POLICIES)
    for tier, (lo, hi) in whole.tiers.items():
        alone = plan_for(records, RULES, SPEC.only(tier), policies=POLICIES).dense(q.device)
        assert (alone[..., lo:hi] == whole.dense(q.device)[..., lo:hi]).all()
        assert int(alone.sum()) == int(whole.dense(q.device)[..., lo:hi].sum()) > 0
