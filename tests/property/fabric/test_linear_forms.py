"""Linear mode, arbitrary rules and records: chunked, recurrent and quadratic form agree; nothing forbidden leaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.distinction.generators import random_records, random_rules
from refractor_megatron.distinction.lowerings import dense_legal
from refractor_megatron.distinction.rules import CompiledRules, compile_rules
from refractor_megatron.fabric.linear import (
    FeatureMap,
    LinearMode,
    LinearPlan,
    LinearState,
    linear_attention,
    linear_plan_for,
    quadratic_linear_attention,
)

BATCH, KV_HEADS, D = 2, 2, 8
seeds = st.integers(0, 2**32 - 1)
kernels = st.sampled_from(["elu+1", "favor+"])


def case(
    seed: int, kernel: str, length: int, rising: bool = False
) -> tuple[LinearPlan, FeatureMap, list[torch.Tensor]]:
    """(plan, features, [q, k, v]); ``rising`` sorts documents and segments, as decoding wants them."""
    rng = np.random.default_rng(seed)
    rules = compile_rules(random_rules(rng, causal=True))
    records = np.stack([random_records(rng, length) for _ in range(BATCH)])
    if rng.random() < 0.5:
        records[:, :, 2:] = records[:, ::40, 2:].repeat(40, axis=1)[:, :length]  # few buckets: panels of many chunks
    if rising:
        records = np.stack([sample[np.lexsort((sample[:, 1], sample[:, 0]))] for sample in records])
    heads = KV_HEADS * int(rng.integers(1, 4))
    tensors = [torch.from_numpy(rng.standard_normal((BATCH, h, length, D))) for h in (heads, KV_HEADS, KV_HEADS)]
    features = LinearMode(kernel, 24, seed).feature_map(1, range(KV_HEADS), D, D**-0.5)  # type: ignore[arg-type]
    return linear_plan_for(torch.from_numpy(records), rules), features, tensors


@settings(max_examples=25, deadline=None)
@given(seeds, kernels, st.integers(1, 700))
def test_chunked_is_the_masked_quadratic_form(seed: int, kernel: str, length: int) -> None:
    plan, features, tensors = case(seed, kernel, length)
    leaves = [x.requires_grad_() for x in tensors]
    results = []
    for form in (linear_attention, quadratic_linear_attention):
        out = form(*leaves, plan, features)
        grad = torch.from_numpy(np.random.default_rng(seed).standard_normal(out.shape))
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for chunked, quadratic in zip(*results, strict=True):
        assert torch.allclose(chunked, quadratic, rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seeds, kernels, st.integers(1, 300), st.floats(0, 1))
def test_recurrent_is_the_chunked_form(seed: int, kernel: str, length: int, share: float) -> None:
    """Step by step, and with a first part absorbed at once."""
    plan, features, (q, k, v) = case(seed, kernel, length, rising=True)
    expected = linear_attention(q, k, v, plan, features)
    for absorbed in (0, int(share * length)):
        state = LinearState(plan.rules, features, BATCH, KV_HEADS, D, torch.float64)
        if absorbed:
            state.absorb(k[:, :, :absorbed], v[:, :, :absorbed], plan.records[:, :absorbed])
        for t in range(absorbed, length):
            out = state.step(q[:, :, t], k[:, :, t], v[:, :, t], plan.records[:, t])
            assert torch.allclose(out, expected[:, :, t], rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seeds, kernels, st.integers(2, 500))
def test_a_token_that_may_not_be_read_changes_no_bit(seed: int, kernel: str, length: int) -> None:
    plan, features, tensors = case(seed, kernel, length)
    q, k, v = (x.float() for x in tensors)
    before = linear_attention(q, k, v, plan, features)
    legal = dense_legal(plan.records[0], plan.rules)
    rng = np.random.default_rng(seed)
    for token in rng.integers(0, length, size=3).tolist():
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[0, :, token] = torch.from_numpy(3 * rng.standard_normal(x[0, :, token].shape)).float()
        after = linear_attention(changed[0], changed[1], changed[2], plan, features)
        differs = (after != before).any(-1).any(1)
        assert not differs[1].any(), "another sample of the batch noticed"
        assert not (differs[0] & ~legal[:, token]).any()
        assert bool(differs[0, token]) == bool(legal[token, token])


@pytest.mark.parametrize(("rules", "leaks"), [("sealed", False), ("open", True)])
def test_a_safety_scope_holds_across_chunks(rules: str, leaks: bool) -> None:
    """300 tokens after a restricted span: with the rule its keys change nothing, without it they do."""
    sealed = [{"name": "sealed", "when": {"bits": ["SAFETY_SCOPE"]}, "allow_write_to": []}]
    compiled: CompiledRules = compile_rules(sealed if rules == "sealed" else [])
    records = torch.zeros(1, 400, 4, dtype=torch.int32)
    records[0, 40:60, 3] = 8
    plan = linear_plan_for(records, compiled)
    q, k, v = (torch.randn(1, 2, 400, D, generator=torch.Generator().manual_seed(i)) for i in range(3))
    features = LinearMode().feature_map(1, range(2), D, 1.0)
    before = linear_attention(q, k, v, plan, features)
    k, v = k.clone(), v.clone()
    k[:, :, 45], v[:, :, 45] = 5, -5
    after = linear_attention(q, k, v, plan, features)
    assert bool((after != before)[:, :, 60:].any()) == leaks
    assert bool((after != before)[:, :, 45:60].any()), "inside the scope tokens read each other"
