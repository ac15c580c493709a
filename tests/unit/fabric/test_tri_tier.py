"""The attention entry: equality with stock attention, rows without keys, layouts of memory, precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.fabric import plan_for, tri_tier_attention
from refractor_megatron.fabric.plan import clear_plans
from tests.masks import attn_pool, spec_of

PLAIN = compile_rules([])
BACKENDS = ["dense", "blocksparse_cpu"]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(batch: int, heads: int, kv_heads: int, length: int, d: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = [(batch, heads, length, d), (batch, kv_heads, length, d), (batch, kv_heads, length, d)]
    return [normal(i, *shape, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("length", "group"), [(1, 1), (37, 2), (300, 4)])
@pytest.mark.parametrize("window", [None, "length"])
def test_without_tiers_it_is_stock_causal_attention(backend: str, length: int, group: int, window: str | None) -> None:
    """Window >= L and no summaries: outputs and gradients of SDPA causal, to float64 rounding."""
    q, k, v = qkv(2, 2 * group, 2, length, 8, torch.float64)
    plan = plan_for(torch.zeros(2, length, 4, dtype=torch.int32), PLAIN, spec_of(length if window else None))
    grad = normal(7, *q.shape, dtype=torch.float64)
    ours = tri_tier_attention(q, k, v, None, None, plan, 0.3, backend)
    stock = F.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=True, scale=0.3
    )
    assert torch.allclose(ours, stock, rtol=0, atol=1e-13)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(stock, (q, k, v), grad), strict=True
    ):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys_are_zero_with_zero_gradients(backend: str) -> None:
    records = torch.zeros(2, 80, 4, dtype=torch.int32)
    records[0, 50:, 0] = -1
    records[1, :, 0] = -1
    plan = plan_for(records, PLAIN, spec_of(16, 8, 1))
    assert plan.stats.fully_masked_rows == 110
    q, k, v = qkv(2, 4, 2, 80, 8, torch.float32)
    p = normal(5, 2, 1, 8).requires_grad_()
    out = tri_tier_attention(q, k, v, *attn_pool(k, v, p, 8, None), plan, 0.3, backend)
    grads = torch.autograd.grad(out.sum(), (q, k, v, p))
    assert not out[0, :, 50:].any() and not out[1].any() and bool(out[0, :, :50].any())
    assert all(bool(g.isfinite().all()) for g in grads)
    assert not grads[0][0, :, 50:].any() and not grads[1][0, :, 50:].any() and not grads[2][1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_padding_only(backend: str) -> None:
    records = torch.full((1, 40, 4), -1, dtype=torch.int32)
    records[:, :, 1:] = 0
    q, k, v = qkv(1, 2, 2, 40, 8, torch.float32)
    out = tri_tier_attention(q, k, v, None, None, plan_for(records, PLAIN, spec_of(None)), 1.0, backend)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert not out.any() and not any(g.any() for g in grads)


def test_any_strides_and_expanded_gradients() -> None:
    """Megatron's [L, b, h, d] memory and a gradient of stride zero give the same numbers as contiguous memory."""
    records = torch.zeros(3, 70, 4, dtype=torch.int32)
    plan = plan_for(records, PLAIN, spec_of(20, 10, 2))
    q, k, v = (x.detach() for x in qkv(3, 2, 2, 70, 8, torch.float64))
    p = normal(4, 2, 2, 8, dtype=torch.float64)
    results = []
    for convert in (torch.Tensor.contiguous, lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)):
        leaves = [convert(x).requires_grad_() for x in (q, k, v)]
        out = tri_tier_attention(*leaves, *attn_pool(leaves[1], leaves[2], p, 10, None), plan, 0.3, "blocksparse_cpu")
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_rows_that_are_not_contiguous_are_made_so() -> None:
    """The fused op reads rows as if they were contiguous, without a check: wrong numbers, no error."""

    def odd(x: torch.Tensor) -> torch.Tensor:
        return x.detach().transpose(2, 3).contiguous().transpose(2, 3)

    plan = plan_for(torch.zeros(1, 70, 4, dtype=torch.int32), PLAIN, spec_of(20))
    tensors, grad = qkv(1, 2, 2, 70, 8, torch.float64), normal(9, 1, 2, 70, 8, dtype=torch.float64)
    results = []
    for leaves, g in ((tensors, grad), ([odd(x).requires_grad_() for x in tensors], odd(grad))):
        out = tri_tier_attention(leaves[0], leaves[1], leaves[2], None, None, plan, 0.3, "blocksparse_cpu")
        results.append([out, *torch.autograd.grad(out, leaves, g)])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_bf16_key_gradients_add_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal scores the value gradient of token 0 is 1 + 1/2 + ... + 1/L = 8.2, in 64 visits of ever smaller parts:
    bf16 sums would stop growing at about 7.6, where a part falls below half a unit in the last place."""
    monkeypatch.setattr("refractor_megatron.fabric.plan.query_block", lambda length, window: 32)
    length = 2048
    plan = plan_for(torch.zeros(1, length, 4, dtype=torch.int32), PLAIN, spec_of(None))
    q, k, v = (torch.zeros(1, 1, length, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = tri_tier_attention(q, k, v, None, None, plan, 1.0, "blocksparse_cpu")
    (dv,) = torch.autograd.grad(out.sum(), (v,))
    assert float(dv[0, 0, 0, 0]) == pytest.approx(sum(1 / n for n in range(1, length + 1)), abs=0.08)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_bf16_follows_float32(one_by_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    records = torch.zeros(2, 256, 4, dtype=torch.int32)
    records[1, 100:, 0] = 1
    if one_by_one:
        monkeypatch.setattr("refractor_megatron.fabric.layout._UNION", 0.0)
        monkeypatch.setattr("refractor_megatron.fabric.layout._SMALL", 0)
        clear_plans()
    plan = plan_for(records, PLAIN, spec_of(64, 16, 2))
    assert all((visit.samples != (0, 2)) == one_by_one for visit in plan.layout.visits)
    low = [x.detach().bfloat16().requires_grad_() for x in qkv(2, 4, 2, 256, 16, torch.float32)]
    high = [x.detach().float().requires_grad_() for x in low]
    p, grad = normal(5, 2, 2, 16), normal(6, 2, 4, 256, 16)
    results = []
    for leaves in (low, high):
        pool = attn_pool(leaves[1], leaves[2], p.to(leaves[0].dtype), 16, None)
        out = tri_tier_attention(*leaves, *pool, plan, 0.25, "blocksparse_cpu")
        assert out.dtype == leaves[0].dtype
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    for a, b in zip(*results, strict=True):
        assert float((a.float() - b).detach().abs().max() / b.detach().abs().max()) < 2e-2


def test_backward_cost_follows_visited_pairs() -> None:
    """No full-length tensor per visit: saved and temporary memory would show as quadratic element counts."""
    records = torch.zeros(1, 2048, 4, dtype=torch.int32)
    q, k, v = qkv(1, 1, 1, 2048, 8, torch.float32)
    plan = plan_for(records, PLAIN, spec_of(64))
    out = tri_tier_attention(q, k, v, None, None, plan, 0.3, "blocksparse_cpu")
    node = out.grad_fn
    assert node is not None and type(node).__name__ == "_BlockSparseBackward"
    assert [type(f).__name__ for f, _ in node.next_functions if f is not None] == ["AccumulateGrad"] * 3
    assert sum(t.numel() for t in node.saved_tensors if t is not None) <= 5 * q.numel()  # type: ignore[attr-defined]


def test_shapes_that_do_not_fit_the_plan_are_our_mistake() -> None:
    plan = plan_for(torch.zeros(1, 32, 4, dtype=torch.int32), PLAIN, spec_of(8, 4, 1))
    q, k, v = qkv(1, 3, 2, 32, 8, torch.float32)
    with pytest.raises(AssertionError, match="3 query heads over 2"):
        tri_tier_attention(q, k, v, None, None, plan, 1.0)
    q, k, v = qkv(1, 2, 2, 32, 8, torch.float32)
    with pytest.raises(AssertionError, match="8 far keys, none were given"):
        tri_tier_attention(q, k, v, None, None, plan, 1.0)
    q, k, v = qkv(1, 2, 2, 31, 8, torch.float32)
    with pytest.raises(AssertionError):
        tri_tier_attention(q, k, v, None, None, plan, 1.0)
