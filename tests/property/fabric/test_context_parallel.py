"""Attention of all context-parallel ranks together equals attention of one rank: outputs and every gradient, fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from refractor_megatron.distinction.generators import random_records, random_rules
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.fabric import plan_for, pool, tri_tier_attention
from refractor_megatron.fabric.context_parallel import gather_summaries, local_shard, part_of, with_halos
from refractor_megatron.fabric.spec import ContextPart, MaskSpec, SummarySpec
from tests.ranks import in_threads

INV_FREQ = torch.tensor([1.0, 0.1], dtype=torch.float64)
PATTERNS = st.one_of(
    st.builds(LocalPattern, st.just("sliding"), st.integers(1, 40), stride=st.just(1)),
    st.builds(LocalPattern, st.just("sliding"), st.integers(8, 40), stride=st.integers(2, 8)),
    st.builds(LocalPattern, st.just("block"), st.integers(1, 30)),
    st.builds(LocalPattern, st.just("dilated"), st.integers(2, 16), st.integers(1, 3), st.sampled_from([1, 2, 8])),
    st.builds(LocalPattern, st.just("hybrid"), st.integers(2, 16), st.integers(1, 3), st.sampled_from([1, 4])),
)


@pytest.mark.parametrize("backend", ["dense", "blocksparse_cpu"])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([2, 3, 4]),
    block=st.sampled_from([4, 8]),
    blocks=st.integers(2, 6),
    per_block=st.integers(0, 2),
    heads=st.sampled_from([(2, 2), (4, 2), (4, 1)]),
    pattern=PATTERNS,
)
def test_parts_equal_the_whole(
    backend: str,
    seed: int,
    size: int,
    block: int,
    blocks: int,
    per_block: int,
    heads: tuple[int, int],
    pattern: LocalPattern,
) -> None:
    rng = np.random.default_rng(seed)
    length, width, scale = 2 * size * block * blocks, 6, 0.4
    reach = pattern.reach(length)
    assume(reach <= block * blocks)
    rules = compile_rules(random_rules(rng, causal=True))
    records = torch.from_numpy(np.stack([random_records(rng, length) for _ in range(2)]))
    spec = MaskSpec(pattern, SummarySpec(block, per_block) if per_block else None)
    plans = [plan_for(records, rules, spec, ContextPart(rank, size)) for rank in range(size)]
    shapes = [(2, heads[0], length, width), *[(2, heads[1], length, width)] * 2, (heads[1], per_block, width)]
    data = [torch.from_numpy(rng.standard_normal(shape)) for shape in shapes]
    upstream = torch.from_numpy(rng.standard_normal(shapes[0]))

    def rank(group: Any) -> list[torch.Tensor]:
        part = part_of(group)
        q, k, v = (local_shard(x, 2, part).requires_grad_() for x in data[:3])
        queries = data[3].clone().requires_grad_()
        far: tuple[Any, ...] = (None, None)
        if per_block:
            chunks = zip(k.chunk(2, 2), v.chunk(2, 2), part.chunks(length), strict=True)
            own = [pool("attn_pool", *kv, queries, per_block, block, INV_FREQ, lo) for *kv, (lo, _) in chunks]
            far = gather_summaries(*(torch.cat(x, 2) for x in zip(*own, strict=True)), group)
        out = tri_tier_attention(q, *with_halos(k, v, reach, group), *far, plans[part.rank], scale, backend)
        out.backward(local_shard(upstream, 2, part))
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (q, k, v, queries)]
        return [out.detach(), *gradients]

    q, k, v, queries = (x.clone().requires_grad_() for x in data)
    far = pool("attn_pool", k, v, queries, per_block, block, INV_FREQ) if per_block else (None, None)
    out = tri_tier_attention(q, k, v, *far, plan_for(records, rules, spec), scale, "dense")
    out.backward(upstream)
    found = in_threads(size, rank)
    for n, parts in enumerate(found):
        expected = [local_shard(x, 2, ContextPart(n, size)) for x in (out.detach(), q.grad, k.grad, v.grad)]
        for name, ours, theirs in zip(("out", "q", "k", "v"), parts, expected, strict=False):
            assert (ours - theirs).abs().max() <= 1e-12 * max(1.0, float(theirs.abs().max())), (n, name)
    if per_block:
        total = sum(parts[4] for parts in found)
        assert (total - queries.grad).abs().max() <= 1e-12 * max(1.0, float(queries.grad.abs().max()))
