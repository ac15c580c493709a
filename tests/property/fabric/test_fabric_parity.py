"""blocksparse_cpu equals the dense oracle, forward and all gradients, over random masks, shapes and head ratios."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.distinction.generators import random_records, random_rules
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.fabric import layout, plan_for, tri_tier_attention
from tests.masks import attn_pool, spec_of

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    length=st.integers(1, 300),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (4, 1)]),
    width=st.sampled_from([4, 10, 16]),
    window=st.none() | st.integers(1, 320),
    block=st.none() | st.integers(1, 40),
    per_block=st.integers(1, 3),
    union=st.sampled_from([0.0, 1.5, 1e9]),
)
def test_forward_and_gradients(
    dtype: torch.dtype,
    seed: int,
    batch: int,
    length: int,
    heads: tuple[int, int],
    width: int,
    window: int | None,
    block: int | None,
    per_block: int,
    union: float,
) -> None:
    rng = np.random.default_rng(seed)
    rules = compile_rules(random_rules(rng))
    records = torch.from_numpy(np.stack([random_records(rng, length) for _ in range(batch)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_UNION", union)
        patch.setattr(layout, "_SMALL", 0)
        plan = plan_for(records, rules, spec_of(window, block, per_block))
    shapes = (
        [(batch, heads[0], length, width)] + [(batch, heads[1], length, width)] * 2 + [(heads[1], per_block, width)]
    )
    data = [torch.from_numpy(rng.standard_normal(shape)).to(dtype) for shape in (*shapes, shapes[0])]
    inv_freq = torch.tensor([1.0, 0.1], dtype=torch.float64)
    results = []
    for backend in ("blocksparse_cpu", "dense"):
        q, k, v, p = leaves = [x.clone().requires_grad_() for x in data[:4]]
        pool = (None, None) if block is None else attn_pool(k, v, p, block, inv_freq)
        out = tri_tier_attention(q, k, v, *pool, plan, width**-0.5, backend)
        grads = torch.autograd.grad(out, leaves, data[4], allow_unused=True)
        results.append([out, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))])
    for name, ours, oracle in zip(("out", "q", "k", "v", "p"), *results, strict=True):
        error = float((ours - oracle).detach().abs().max())
        assert error <= TOLERANCE[dtype] * max(1.0, float(oracle.detach().abs().max())), (name, error)
