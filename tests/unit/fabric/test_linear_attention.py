"""Linear mode: definition, refusals, padding, precision, and what its plan keeps alive."""

from __future__ import annotations

import pytest
import torch

from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.errors import ConfigError, DataError
from refractor_megatron.fabric.linear import LinearMode, LinearState, linear_attention, linear_plan_for

PLAIN = compile_rules([])
ELU = LinearMode().feature_map(1, range(2), 8, 1.0)


def qkv(length: int, heads: int = 4, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(1, heads, length, 8), (1, 2, length, 8), (1, 2, length, 8)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def blank(length: int, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, length, 4, dtype=torch.int32)


def test_the_definition_token_by_token() -> None:
    """One running state and one running normaliser for each key head, no masks: the formula of the paper."""
    q, k, v = qkv(300)
    out = linear_attention(q, k, v, linear_plan_for(blank(300), PLAIN), ELU)
    fq, fk = ELU.query(q), ELU.key(k)
    for head in range(4):
        state, weight = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
        for t in range(300):
            state += torch.outer(fk[0, head // 2, t], v[0, head // 2, t])
            weight += fk[0, head // 2, t]
            expected = (fq[0, head, t] @ state) / (fq[0, head, t] @ weight)
            assert torch.allclose(out[0, head, t], expected, rtol=0, atol=1e-12)


def test_rules_that_read_ahead_are_refused() -> None:
    rules = compile_rules([{"name": "both-ways", "when": {"role": "code"}, "causal": False}])
    with pytest.raises(ConfigError, match=r"rule 'both-ways' has causal: false; set it to true, or relation\.linear"):
        linear_plan_for(blank(8), rules)
    with pytest.raises(ConfigError, match="both-ways"):
        LinearState(rules, ELU, 1, 2, 8)


def test_padding_is_zero_with_zero_gradients() -> None:
    records = blank(400, batch=2)
    records[0, 100:300, 0] = -1
    records[1, :, 0] = -1
    leaves = [torch.cat([x, x]).requires_grad_() for x in qkv(400)]
    out = linear_attention(leaves[0], leaves[1], leaves[2], linear_plan_for(records, PLAIN), ELU)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert not out[0, :, 100:300].any() and not out[1].any() and bool(out[0, :, 300:].any())
    assert not any(g[0, :, 100:300].any() or g[1].any() for g in grads)
    assert all(bool(g.isfinite().all()) for g in grads)


def test_a_token_reads_itself_where_its_role_may_not() -> None:
    rules = compile_rules([{"name": "deaf", "when": {"role": "system"}, "allow_read_from": []}])
    q, k, v = qkv(200)
    out = linear_attention(q, k, v, linear_plan_for(blank(200), rules), ELU)
    assert torch.allclose(out, v.repeat_interleave(2, dim=1), atol=1e-14)
    state = LinearState(rules, ELU, 1, 2, 8, torch.float64)
    for t in range(3):
        step = state.step(q[:, :, t], k[:, :, t], v[:, :, t], blank(1)[:, 0])
        assert torch.allclose(step, out[:, :, t], atol=1e-14)


def test_bf16_is_computed_in_float32() -> None:
    low = [x.bfloat16() for x in qkv(600)]
    plan = linear_plan_for(blank(600), PLAIN)
    out = linear_attention(low[0], low[1], low[2], plan, ELU)
    reference = linear_attention(*(x.double() for x in low), plan, ELU)  # type: ignore[arg-type]
    assert out.dtype == torch.bfloat16
    assert float((out.double() - reference).abs().max()) < 2**-8 * float(reference.abs().max())


def test_columns_behind_the_record_are_ignored() -> None:
    records = torch.cat([blank(200), torch.arange(200, dtype=torch.int32).reshape(1, 200, 1)], dim=2)
    q, k, v = qkv(200)
    expected = linear_attention(q, k, v, linear_plan_for(blank(200), PLAIN), ELU)
    assert torch.equal(linear_attention(q, k, v, linear_plan_for(records, PLAIN), ELU), expected)


def test_plans_are_made_once_for_a_batch_of_records() -> None:
    records = blank(300)
    plan = linear_plan_for(records, PLAIN)
    assert linear_plan_for(records.detach(), PLAIN) is plan
    records[0, 100:, 0] = 1
    assert linear_plan_for(records, PLAIN) is not plan


@pytest.mark.parametrize("column", [0, 1])
def test_states_die_with_their_document_or_segment(column: int) -> None:
    """200 documents (or segments of one document) of 3 roles: what is held does not grow with their number."""
    held = []
    for parts in (20, 200):
        records = blank(parts * 100)
        records[0, :, column] = torch.arange(parts).repeat_interleave(100)
        records[0, :, 2] = torch.tensor([1, 2, 3]).repeat(parts * 100)[: parts * 100]
        rules = compile_rules([{"name": "t", "when": {"role": "tool"}, "allow_write_to": ["assistant"]}])
        held.append(max(panel.reads.shape[2] for panel in linear_plan_for(records, rules).panels))
    assert held[0] == held[1] < 50


def test_shared_roles_live_as_long_as_their_document() -> None:
    """A system prompt is read by every later segment, across panels."""
    records = blank(5000)
    records[0, :, 1] = torch.arange(50).repeat_interleave(100)
    records[0, 100:, 2] = 1
    plan = linear_plan_for(records, PLAIN)
    assert len(plan.panels) > 1
    q, k, v = qkv(5000, heads=2)
    before = linear_attention(q, k, v, plan, ELU)
    v = v.clone()
    v[:, :, 50] += 1
    assert bool((linear_attention(q, k, v, plan, ELU) != before).any(-1)[:, :, 50:].all())


def test_decoding_holds_the_live_buckets_only() -> None:
    q, k, v = qkv(600)
    sealed = compile_rules([{"name": "t", "when": {"role": "tool"}, "allow_write_to": ["assistant"]}])
    state = LinearState(sealed, ELU, 1, 2, 8, torch.float64)
    most = 0
    for t in range(600):
        record = torch.tensor([[t // 200, t // 10, (0, 1, 3)[t % 3], 0]])
        state.step(q[:, :, t], k[:, :, t], v[:, :, t], record)
        most = max(most, *state.live)
    assert most <= 4 and state.states.shape[1] == 4, "system, user and tool of this segment, system of earlier ones"


def test_decoding_refuses_a_document_that_comes_back() -> None:
    q, k, v = (x[:, :, 0] for x in qkv(1))
    state = LinearState(PLAIN, ELU, 1, 2, 8)
    state.step(q, k, v, torch.tensor([[3, 0, 0, 0]]))
    with pytest.raises(DataError, match="goes back from document 3, segment 0 to document 2, segment 5; decode"):
        state.step(q, k, v, torch.tensor([[2, 5, 0, 0]]))


def test_forward_keeps_its_inputs_and_the_states_between_panels() -> None:
    """No features, scores or sums stay for the backward pass: they would be many times the inputs."""
    q, k, v = (x.float().requires_grad_() for x in qkv(16384))
    plan = linear_plan_for(blank(16384), PLAIN)
    kept: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        linear_attention(q, k, v, plan, ELU)
    assert sum(kept) < 1.05 * (q.numel() + k.numel() + v.numel())
