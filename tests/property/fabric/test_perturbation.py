"""Information flow: a changed token changes nothing, not one bit, where no legal path leads.

Three stacked layers of attention with summaries. The legal edges come from the elementwise oracle (a summary counts as
all of its tokens, and the oracle's rule says when it may be read); their closure says who may notice.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.distinction.closure import reachable
from refractor_megatron.distinction.generators import random_records, random_rules
from refractor_megatron.distinction.lowerings import dense_block_mask, dense_legal, dense_mask
from refractor_megatron.distinction.rules import CompiledRules, compile_rules
from refractor_megatron.fabric import MaskPlan, plan_for, tri_tier_attention
from tests.masks import attn_pool, sliding, spec_of

LAYERS, HEADS, KV_HEADS, WIDTH = 3, 4, 2, 8
INV_FREQ = torch.tensor([1.0, 0.3, 0.1])


def model(x: torch.Tensor, weights: torch.Tensor, p: torch.Tensor, plan: MaskPlan) -> torch.Tensor:
    """x [b, L, HEADS * WIDTH]: attention with residuals, LAYERS times."""
    b, length, _ = x.shape
    for layer in range(LAYERS):
        q, k, v = (x @ weights[layer]).split([HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH], dim=-1)
        q = q.view(b, length, HEADS, WIDTH).transpose(1, 2)
        k, v = (y.view(b, length, KV_HEADS, WIDTH).transpose(1, 2) for y in (k, v))
        pool = attn_pool(k, v, p[layer], plan.spec.summary.block_size, INV_FREQ) if plan.spec.summary else (None, None)
        out = tri_tier_attention(q, k, v, *pool, plan, WIDTH**-0.5, "blocksparse_cpu")
        x = x + out.transpose(1, 2).reshape(b, length, HEADS * WIDTH)
    return x


def one_layer(records: torch.Tensor, rules: CompiledRules, window: int, block: int) -> torch.Tensor:
    """bool [L, L]: the tokens whose content one layer brings to each query, local and through summaries."""
    length = len(records)
    seen = dense_mask(records, rules, sliding(window))
    blocks = length // block
    tokens = dense_block_mask(records, rules, sliding(window), block).repeat_interleave(block, 1)
    seen[:, : blocks * block] |= tokens
    assert not (seen & ~dense_legal(records, rules)).any(), "a tier reads what the rules forbid"
    return seen


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(40, 160), window=st.integers(1, 40), block=st.integers(2, 16))
def test_only_reachable_positions_notice_a_changed_token(seed: int, length: int, window: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    rules = compile_rules(random_rules(rng))
    records = torch.from_numpy(np.stack([random_records(rng, length) for _ in range(2)]))
    plan = plan_for(records, rules, spec_of(window, block, 2))
    width = HEADS * WIDTH
    x = torch.from_numpy(rng.standard_normal((2, length, width))).float()
    weights = torch.from_numpy(rng.standard_normal((LAYERS, width, width + 2 * KV_HEADS * WIDTH)) / width**0.5).float()
    p = torch.from_numpy(rng.standard_normal((LAYERS, KV_HEADS, 2, WIDTH))).float()
    before = model(x, weights, p, plan)
    for token in rng.integers(0, length, size=3):
        changed = x.clone()
        changed[0, token] = torch.from_numpy(10 * rng.standard_normal(width)).float()
        differs = (model(changed, weights, p, plan) != before).any(dim=-1)
        assert not differs[1].any(), "another sample of the batch noticed"
        may_notice = reachable(one_layer(records[0], rules, window, block))[:, token]
        assert not (differs[0] & ~may_notice).any()
        assert bool(differs[0, token])


def test_the_test_can_see_a_leak() -> None:
    """With summaries of another mask (everything readable), a forbidden position does notice."""
    length, block = 96, 8
    records = torch.zeros(1, length, 4, dtype=torch.int32)
    records[0, 8:16, 3] = 8
    sealed = compile_rules([{"name": "s", "when": {"bits": ["SAFETY_SCOPE"]}, "allow_write_to": []}])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, HEADS * WIDTH, generator=generator)
    weights = torch.randn(LAYERS, HEADS * WIDTH, (HEADS + 2 * KV_HEADS) * WIDTH, generator=generator) / 6
    p = torch.randn(LAYERS, KV_HEADS, 2, WIDTH, generator=generator)
    changed = x.clone()
    changed[0, 10] += 1
    unreachable = ~reachable(one_layer(records[0], sealed, 8, block))[:, 10]
    assert bool(unreachable[95])
    for rules, leaks in ((sealed, False), (compile_rules([]), True)):
        plan = plan_for(records, rules, spec_of(8, block, 2))
        differs = (model(x, weights, p, plan) != model(changed, weights, p, plan)).any(-1)[0]
        assert bool((differs & unreachable).any()) == leaks
