"""Plans: what is cached and when, shared work, counters, and the layout of visits."""

from __future__ import annotations

import pytest
import torch

from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.fabric import plan as plan_module
from refractor_megatron.fabric.plan import PLANS_KEPT, clear_plans, plan_for, query_block
from tests.masks import spec_of

PLAIN = compile_rules([])
SEALED = compile_rules([{"name": "s", "when": {"bits": ["SAFETY_SCOPE"]}, "allow_write_to": []}])


@pytest.fixture(autouse=True)
def fresh() -> None:
    clear_plans()


def plain(batch: int, length: int) -> torch.Tensor:
    records = torch.zeros(batch, length, 4, dtype=torch.int32)
    records[:, :, 2] = 5
    return records


def test_the_same_memory_hits_also_through_detached_aliases() -> None:
    records = plain(2, 64)
    plan = plan_for(records, PLAIN, spec_of(16, 8, 2))
    assert plan_for(records, PLAIN, spec_of(16, 8, 2)) is plan
    assert plan_for(records.detach(), PLAIN, spec_of(16, 8, 2)) is plan
    assert plan_for(records.view(2, 64, 4), compile_rules([]), spec_of(16, 8, 2)) is plan


def test_other_parameters_or_a_write_miss() -> None:
    records = plain(2, 64)
    plan = plan_for(records, PLAIN, spec_of(16, 8, 2))
    for other in (
        plan_for(records, SEALED, spec_of(16, 8, 2)),
        plan_for(records, PLAIN, spec_of(17, 8, 2)),
        plan_for(records, PLAIN, spec_of(16, 16, 2)),
        plan_for(records, PLAIN, spec_of(16, 8, 1)),
        plan_for(records[:1], PLAIN, spec_of(16, 8, 2)),
    ):
        assert other is not plan
    legal = plan.stats.legal_edges
    records[:, 32:, 0] = 1
    assert plan_for(records, PLAIN, spec_of(16, 8, 2)).stats.legal_edges < legal


def test_a_cached_plan_keeps_its_memory_alive() -> None:
    """Otherwise the next batch could land on the same address with another mask."""
    addresses = []
    for _ in range(PLANS_KEPT):
        records = plain(1, 64)
        plan_for(records, PLAIN, spec_of(None))
        addresses.append(records.data_ptr())
        del records
    assert len(set(addresses)) == PLANS_KEPT


def test_the_cache_is_bounded() -> None:
    kept = [plain(1, 32) for _ in range(PLANS_KEPT + 5)]
    for records in kept:
        plan_for(records, PLAIN, spec_of(None))
    assert len(plan_module._plans.items) == PLANS_KEPT


def test_inference_tensors_are_not_cached() -> None:
    with torch.inference_mode():
        records = plain(1, 32)
        first = plan_for(records, PLAIN, spec_of(None))
        records[:, 16:, 0] = 1
        assert plan_for(records, PLAIN, spec_of(None)).stats.legal_edges < first.stats.legal_edges


def test_plain_samples_share_one_layout_across_batches() -> None:
    a, b = plain(4, 128), plain(4, 128)
    b[:, :, 2] = 3
    first, second = plan_for(a, PLAIN, spec_of(32, 8, 2)), plan_for(b, PLAIN, spec_of(32, 8, 2))
    assert first is not second and first.layout is second.layout
    assert all(
        visit.samples == (0, 4) and len(first.layout.legal(i)) == 1 for i, visit in enumerate(first.layout.visits)
    )


def test_summaries_can_be_off() -> None:
    records = plain(1, 64)
    assert plan_for(records, PLAIN, spec_of(16, None, 2)).n_far == 0
    assert plan_for(records, PLAIN, spec_of(16, 8, 0)) is plan_for(records, PLAIN, spec_of(16))
    assert plan_for(records, PLAIN, spec_of(16, 128, 2)).n_far == 0


def test_stats_count_edges_rows_and_pairs() -> None:
    records = plain(2, 96)
    records[1, 90:, 0] = -1
    plan = plan_for(records, PLAIN, spec_of(16, 8, 2))
    dense = plan.dense(torch.device("cpu"))
    assert plan.stats.legal_edges == int(dense.sum())
    assert plan.stats.fully_masked_rows == 6 == int((~dense.any(-1)).sum())
    assert plan.stats.causal_pairs == 2 * 96 * 97 // 2
    assert "layout" not in plan.__dict__, "counters need none"
    assert plan.stats.legal_edges <= plan.layout.visited_pairs <= dense.numel()


def test_query_block_follows_the_window() -> None:
    assert [query_block(512, w) for w in (1, 64, 128, 256, 512, None)] == [32, 32, 64, 128, 128, 128]
    assert query_block(16, None) == 32
