"""Plans: what is cached and when, shared work, counters, and the layout of visits."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from refractor_megatron.distinction.generators import random_records
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.fabric import layout as layout_module
from refractor_megatron.fabric import plan as plan_module
from refractor_megatron.fabric.plan import PLANS_KEPT, clear_plans, plan_for, query_block

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
    plan = plan_for(records, PLAIN, 16, 8, 2)
    assert plan_for(records, PLAIN, 16, 8, 2) is plan
    assert plan_for(records.detach(), PLAIN, 16, 8, 2) is plan
    assert plan_for(records.view(2, 64, 4), compile_rules([]), 16, 8, 2) is plan


def test_other_parameters_or_a_write_miss() -> None:
    records = plain(2, 64)
    plan = plan_for(records, PLAIN, 16, 8, 2)
    for other in (
        plan_for(records, SEALED, 16, 8, 2),
        plan_for(records, PLAIN, 17, 8, 2),
        plan_for(records, PLAIN, 16, 16, 2),
        plan_for(records, PLAIN, 16, 8, 1),
        plan_for(records[:1], PLAIN, 16, 8, 2),
    ):
        assert other is not plan
    legal = plan.stats.legal_edges
    records[:, 32:, 0] = 1
    assert plan_for(records, PLAIN, 16, 8, 2).stats.legal_edges < legal


def test_a_cached_plan_keeps_its_memory_alive() -> None:
    """Otherwise the next batch could land on the same address with another mask."""
    addresses = []
    for _ in range(PLANS_KEPT):
        records = plain(1, 64)
        plan_for(records, PLAIN, None, None, 0)
        addresses.append(records.data_ptr())
        del records
    assert len(set(addresses)) == PLANS_KEPT


def test_the_cache_is_bounded() -> None:
    kept = [plain(1, 32) for _ in range(PLANS_KEPT + 5)]
    for records in kept:
        plan_for(records, PLAIN, None, None, 0)
    assert len(plan_module._plans.items) == PLANS_KEPT


def test_inference_tensors_are_not_cached() -> None:
    with torch.inference_mode():
        records = plain(1, 32)
        first = plan_for(records, PLAIN, None, None, 0)
        records[:, 16:, 0] = 1
        assert plan_for(records, PLAIN, None, None, 0).stats.legal_edges < first.stats.legal_edges


def test_plain_samples_share_one_layout_across_batches() -> None:
    a, b = plain(4, 128), plain(4, 128)
    b[:, :, 2] = 3
    first, second = plan_for(a, PLAIN, 32, 8, 2), plan_for(b, PLAIN, 32, 8, 2)
    assert first is not second and first.layout is second.layout
    assert all(len(visit.tables) == 1 for visit in first.layout.visits)
    assert first.layout.bias(0, torch.float32, 2).shape[0] == 1  # type: ignore[union-attr]


def test_summaries_can_be_off() -> None:
    records = plain(1, 64)
    assert plan_for(records, PLAIN, 16, None, 2).n_summaries == 0
    assert plan_for(records, PLAIN, 16, 8, 0) is plan_for(records, PLAIN, 16, None, 0)
    assert plan_for(records, PLAIN, 16, 128, 2).n_summaries == 0


def test_stats_count_edges_rows_and_pairs() -> None:
    records = plain(2, 96)
    records[1, 90:, 0] = -1
    plan = plan_for(records, PLAIN, 16, 8, 2)
    dense = plan.dense(torch.device("cpu"))
    assert plan.stats.legal_edges == int(dense.sum())
    assert plan.stats.fully_masked_rows == 6 == int((~dense.any(-1)).sum())
    assert plan.stats.causal_pairs == 2 * 96 * 97 // 2
    assert plan.stats.legal_edges <= plan.stats.visited_pairs <= dense.numel()


@pytest.mark.parametrize("union", [0.0, 1.5, 1e9])
def test_visits_cover_every_legal_edge_once(union: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scattering the visits' masks gives the dense mask, whether samples are visited together or one by one."""
    monkeypatch.setattr(layout_module, "_UNION", union)
    monkeypatch.setattr(layout_module, "_SMALL", 0)
    rng = np.random.default_rng(0)
    records = torch.from_numpy(np.stack([random_records(rng, 200) for _ in range(3)]))
    plan = plan_for(records, SEALED, 24, 8, 2)
    together = [visit.samples is None for visit in plan.layout.visits]
    assert all(together) if union == 1e9 else not any(together) if union == 0.0 else True
    seen = torch.zeros(3, 200, plan.n_summaries + 200, dtype=torch.int32)
    for i, visit in enumerate(plan.layout.visits):
        keys = [torch.arange(lo, hi) for lo, hi in visit.summaries]
        keys += [torch.arange(lo, hi) + plan.n_summaries for lo, hi in visit.tokens]
        legal = torch.from_numpy(plan.layout.legal(i)).int()
        for j, sample in enumerate(visit.samples or range(3)):
            seen[sample, visit.first : visit.last, torch.cat(keys)] += legal[j]
    assert torch.equal(seen, plan.dense(torch.device("cpu")).int())


def test_visits_follow_the_window_not_the_length() -> None:
    stats = [plan_for(plain(1, length), PLAIN, 512, None, 0).stats for length in (4096, 16384)]
    per_query = [s.visited_pairs / length for s, length in zip(stats, (4096, 16384), strict=True)]
    assert per_query[1] == pytest.approx(512 + 128, rel=0.02) and per_query[0] < per_query[1]


def test_biases_are_kept_only_while_small(monkeypatch: pytest.MonkeyPatch) -> None:
    small = plan_for(plain(1, 64), PLAIN, 16, 8, 2).layout
    assert small.bias(1, torch.float32, 1) is small.bias(1, torch.float32, 1)
    monkeypatch.setattr(layout_module, "_CACHED_BIAS", 10)
    large = plan_for(plain(1, 65), PLAIN, 16, 8, 2).layout
    first, second = large.bias(1, torch.float32, 2), large.bias(1, torch.float32, 2)
    assert first is not None and second is not None and first is not second and torch.equal(first, second)
    assert first.shape == (1, 1, 64, large.visits[1].keys)


def test_query_block_follows_the_window() -> None:
    assert [query_block(512, w) for w in (1, 64, 128, 256, 512, None)] == [32, 32, 64, 128, 128, 128]
    assert query_block(16, None) == 32


def test_building_is_fast() -> None:
    """Eight different samples of 512 tokens: budget 2 ms each; the test allows for a loaded machine."""
    records = plain(8, 512)
    for i in range(8):
        records[i, 40 * i + 50 :, 0] = 1
    times = []
    for _ in range(5):
        clear_plans()
        start = time.perf_counter()
        plan_for(records, PLAIN, 128, 32, 2)
        times.append(time.perf_counter() - start)
    assert min(times) < 8 * 2e-3 * 2
