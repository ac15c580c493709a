"""Attention statistics against a naive fp64 twin; where they are collected; that ranks add up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from refractor_megatron.distinction.generators import random_records
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.fabric.backends import AttentionInputs, visited_pairs
from refractor_megatron.fabric.measure import TIERS, AttentionProbe, probing
from refractor_megatron.fabric.plan import MaskPlan, plan_for
from refractor_megatron.fabric.sampling import sampled_rows
from refractor_megatron.fabric.spec import ContextPart, MaskSpec, RetrievedSpec, SummarySpec
from tests.masks import sliding, spec_of

RULES = compile_rules([{"name": "t", "when": {"role": "tool"}, "allow_read_from": ["system", "user", "tool"]}])
POLICIES = np.array([3, 1, 2, 0, 3, 3], dtype=np.uint8)
ALL_TIERS = MaskSpec(sliding(9), SummarySpec(8, 2, levels=2, fanout=2), RetrievedSpec(16, 2))
LENGTH, HEADS, KV_HEADS, WIDTH = 72, 4, 2, 8


def records_with_ids(seed: int, batch: int = 2, retrieved: int = 2) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(-1, len(POLICIES), size=(batch, LENGTH // 8, retrieved)))[:, :, ::-1].repeat(8, axis=1)
    ids = ids[:, np.arange(LENGTH) // 16 * 2]  # one list of ids for each chunk of 16
    samples = np.stack([random_records(rng, LENGTH, documents=2) for _ in range(batch)])
    return torch.from_numpy(np.concatenate([samples, ids.astype(np.int32)], axis=2))


def inputs(plan: MaskPlan, seed: int = 0, dtype: torch.dtype = torch.float64) -> AttentionInputs:
    """Normal queries and keys, three times as large; values do not matter here: they are the keys."""
    generator = torch.Generator().manual_seed(seed)
    b = len(plan.samples)
    shapes = ((b, HEADS, plan.length), (b, KV_HEADS, plan.n_tokens), (b, KV_HEADS, plan.n_far))
    q, k, k_far = (3 * torch.randn(*shape, WIDTH, generator=generator, dtype=dtype) for shape in shapes)
    return AttentionInputs(q, k, k, k_far, k_far)


def twin(plan: MaskPlan, x: AttentionInputs, scale: float) -> dict[str, float]:
    """Every statistic, one (sample, head, row) at a time in plain Python, from the dense oracle."""
    assert x.k_far is not None
    q, keys, legal = x.q, torch.cat([x.k_far, x.k], dim=2), plan.dense(torch.device("cpu"))
    seen: dict[str, list[float]] = {name: [] for name in ("h", *(f"m_{t}" for t in TIERS), *(f"h_{t}" for t in TIERS))}
    used = edges = 0
    for b in range(q.shape[0]):
        for head in range(HEADS):
            for row in range(plan.length):
                open_keys = [j for j in range(keys.shape[2]) if legal[b, row, j]]
                if not open_keys:
                    continue
                scores = [float(q[b, head, row] @ keys[b, head // (HEADS // KV_HEADS), j]) * scale for j in open_keys]
                weights = [math.exp(s - max(scores)) for s in scores]
                p = {j: w / sum(weights) for j, w in zip(open_keys, weights, strict=True)}
                used += sum(share > 0.1 / len(p) for share in p.values())
                edges += len(p)
                if len(p) > 1:
                    seen["h"].append(entropy(list(p.values())))
                for tier, (lo, hi) in plan.tiers.items():
                    part = [share for j, share in p.items() if lo <= j < hi]
                    seen[f"m_{tier}"].append(sum(part))
                    if len(part) > 1:
                        seen[f"h_{tier}"].append(entropy(part))
    found = {"entropy": float(np.mean(seen["h"])), "entropy_std": float(np.std(seen["h"])), "edges_used": used / edges}
    found["entropy_median"] = float(np.median(seen["h"]))
    found |= {f"mass_{tier}": float(np.mean(seen[f"m_{tier}"])) for tier in TIERS}
    return found | {f"entropy_{tier}": float(np.mean(seen[f"h_{tier}"])) for tier in TIERS}


def entropy(weights: list[float]) -> float:
    total = sum(weights)
    return -sum(w / total * math.log(w / total) for w in weights) / math.log(len(weights))


@pytest.mark.parametrize("seed", range(3))
def test_statistics_equal_the_twin_over_all_rows(seed: int) -> None:
    plan = plan_for(records_with_ids(seed), RULES, ALL_TIERS, policies=POLICIES)
    x = inputs(plan, seed)
    probe = AttentionProbe(layers=1, rows=LENGTH, seed=0)
    probe.see(1, x, plan, [plan], 0.4)
    metrics, expected = probe.attention_metrics(), twin(plan, x, 0.4)
    assert metrics["attention_entropy_median"] == pytest.approx(expected.pop("entropy_median"), abs=0.011)
    for name, value in expected.items():
        assert metrics[f"attention_{name}"] == pytest.approx(value, rel=1e-10), name
    assert metrics["attention_entropy_layer"] == [metrics["attention_entropy"]]
    assert sum(float(metrics[f"attention_mass_{tier}"]) for tier in TIERS) == pytest.approx(1)  # type: ignore[arg-type]


def test_uniform_attention_has_entropy_one_and_uses_every_edge() -> None:
    records = torch.zeros(1, 64, 4, dtype=torch.int32)
    plan = plan_for(records, RULES, spec_of(8, 8, 1))
    probe = AttentionProbe(layers=2, rows=16, seed=0)
    zeros, far = torch.zeros(1, 1, 64, 4), torch.zeros(1, 1, 8, 4)
    probe.see(2, AttentionInputs(zeros, zeros, zeros, far, far), plan, [plan], 1.0)
    metrics = probe.attention_metrics()
    assert metrics["attention_entropy"] == pytest.approx(1) and metrics["attention_edges_used"] == 1
    assert metrics["attention_entropy_median"] == pytest.approx(1, abs=0.01)
    assert metrics["attention_entropy_local"] == pytest.approx(1)
    rows = plan.dense(torch.device("cpu"))[0, sampled_rows(16, plan.space)].double()
    assert metrics["attention_mass_summary"] == pytest.approx(float((rows[:, :8].sum(1) / rows.sum(1)).mean()))
    assert "attention_mass_retrieved" not in metrics


def test_only_the_first_call_of_a_layer_counts_and_half_precision_is_widened() -> None:
    plan = plan_for(records_with_ids(5), RULES, ALL_TIERS, policies=POLICIES)
    x = inputs(plan, dtype=torch.float32)
    probe, halved = (AttentionProbe(layers=2, rows=20, seed=0) for _ in range(2))
    probe.see(1, x, plan, [plan], 0.4)
    before = probe.table.clone()
    probe.see(1, x._replace(q=5 * x.q), plan, [plan], 0.4)
    assert torch.equal(before, probe.table) and before[1].eq(0).all()
    halved.see(1, AttentionInputs(*(t.bfloat16() for t in x if t is not None)), plan, [plan], 0.4)
    assert halved.attention_metrics()["attention_entropy"] == pytest.approx(
        probe.attention_metrics()["attention_entropy"], abs=0.02
    )


def test_tables_of_heads_layers_and_sequence_parts_add_up_to_the_whole() -> None:
    records = torch.zeros(2, 64, 4, dtype=torch.int32)
    whole = plan_for(records, RULES, spec_of(8, 8, 2))
    x = inputs(whole)
    q, k, _, k_far, _ = x
    assert k_far is not None
    one = AttentionProbe(layers=2, rows=24, seed=0)
    one.see(1, x, whole, [whole], 0.4)
    one.see(2, x._replace(q=q.flip(3)), whole, [whole], 0.4)
    total = torch.zeros_like(one.table)
    for rank in range(2):  # context-parallel ranks
        part = ContextPart(rank, 2)
        plan = plan_for(records, RULES, whole.spec, part)
        rows = torch.cat([torch.arange(*chunk) for chunk in part.chunks(64)])
        held = torch.cat([torch.arange(lo - plan.space.halo, hi).clamp_min(0) for lo, hi in part.chunks(64)])
        for kv in range(2):  # tensor-parallel ranks hold one key head each
            heads = slice(2 * kv, 2 * kv + 2)
            probe = AttentionProbe(layers=2, rows=24, seed=0)
            key, far = k[:, kv : kv + 1, held], k_far[:, kv : kv + 1]
            mine = AttentionInputs(q[:, heads, rows], key, key, far, far)
            probe.see(1, mine, plan, [plan], 0.4)
            probe.see(2, mine._replace(q=mine.q.flip(3)), plan, [plan], 0.4)
            total += probe.table
    both = AttentionProbe(layers=2, rows=24, seed=0)
    both.table = total
    expected = one.attention_metrics()
    for name, value in both.attention_metrics().items():
        assert value == pytest.approx(expected[name], rel=1e-9), name
    masks, shared = one.plan_metrics(128), both.plan_metrics(128)
    assert (
        shared.pop("visited_share") > 0 and masks.pop("visited_share") > 0
    )  # halos and shorter chunks visit otherwise
    assert shared == pytest.approx(masks)


class Attention(torch.nn.Module):
    """Stands for a core attention with a place for a probe."""

    probe: AttentionProbe | None = None

    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number

    def forward(self, q: torch.Tensor, plan: MaskPlan) -> None:
        if self.probe is not None:
            self.probe.see(self.layer_number, AttentionInputs(q, q, q), plan, [plan], 1.0)


def test_probing_hangs_the_probe_on_and_takes_it_off_again() -> None:
    model = torch.nn.ModuleList([Attention(1), torch.nn.Linear(2, 2), Attention(2)])
    plan = plan_for(torch.zeros(1, 32, 4, dtype=torch.int32), RULES, spec_of(4))
    q = torch.randn(1, 2, 32, 4)
    probe = AttentionProbe(layers=2, rows=8, seed=3)
    with probing(model, probe, torch.device("cpu")):
        for module in model:
            if isinstance(module, Attention):
                module(q, plan)
    assert all(getattr(module, "probe", None) is None for module in model)
    layers: Any = probe.attention_metrics()["attention_entropy_layer"]
    assert len(layers) == 2 and layers[0] == layers[1] > 0
    with pytest.raises(RuntimeError), probing(model, probe, torch.device("cpu")):
        raise RuntimeError
    assert all(getattr(module, "probe", None) is None for module in model)


def test_without_rows_only_the_masks_are_measured() -> None:
    records = torch.zeros(1, 32, 4, dtype=torch.int32)
    records[0, 28:, 0] = -1
    plan = plan_for(records, RULES, spec_of(4))
    probe = AttentionProbe(layers=1, rows=0, seed=0)
    assert probe.plan_metrics(32) == {} == probe.attention_metrics()
    q = torch.randn(1, 2, 32, 4)
    probe.see(1, AttentionInputs(q, q, q), plan, [plan], 1.0)
    assert probe.attention_metrics() == {}
    metrics = probe.plan_metrics(32)
    assert metrics["masked_rows"] == 4 and metrics["invalid_edges"] == 0
    assert metrics["edges_used_share"] == pytest.approx((1 + 2 + 3 + 25 * 4) / (32 * 33 / 2))
    assert metrics["visited_share"] >= metrics["edges_used_share"]


@pytest.mark.parametrize("backend", ["dense", "blocksparse_cpu", "flex"])
def test_tiers_run_alone_are_audited_and_counted_as_they_run(backend: str) -> None:
    """Pairs and illegal edges of what is executed; rows without keys and legal edges of the whole mask."""
    plan = plan_for(records_with_ids(1), RULES, ALL_TIERS, policies=POLICIES)
    alone = [plan_for(plan.records, RULES, ALL_TIERS.only(tier), policies=POLICIES) for tier in ALL_TIERS.present]
    x, cpu = inputs(plan), torch.device("cpu")

    def measured(executed: list[MaskPlan]) -> dict[str, float]:
        probe = AttentionProbe(layers=1, rows=0, seed=0)
        probe.see(1, x, plan, executed, 0.4, backend)
        return probe.plan_metrics(2 * LENGTH)

    metrics = measured(alone)
    visited = [visited_pairs(backend, each, cpu) for each in alone]
    assert metrics["visited_share"] == pytest.approx(sum(visited) / plan.stats.causal_pairs) and min(visited) > 0
    assert metrics["invalid_edges"] == 0 and metrics["masked_rows"] == plan.stats.fully_masked_rows
    assert metrics["masked_rows"] < max(each.stats.fully_masked_rows for each in alone)
    assert metrics["edges_used_share"] == plan.stats.legal_edges / plan.stats.causal_pairs
    # The local tier runs with the keys of a longer window: whoever audits the whole mask does not notice.
    wider = plan_for(plan.records, RULES, replace(ALL_TIERS, local=sliding(12)).only("local"), policies=POLICIES)
    wrong = replace(alone[2], samples=wider.samples, layout_key=wider.layout_key)
    if backend != "dense":  # its mask is made from the definition itself
        assert measured([*alone[:2], wrong])["invalid_edges"] > 0 == measured([plan])["invalid_edges"]


def test_sampled_rows_are_one_of_each_part_and_avoid_the_beat_of_blocks() -> None:
    space = plan_for(torch.zeros(1, 512, 4, dtype=torch.int32), RULES, MaskSpec(LocalPattern(window=8))).space
    rows = sampled_rows(64, space)
    assert (rows // 8 == np.arange(64)).all() and len(np.unique(rows % 8)) == 8
    assert (sampled_rows(600, space) == np.arange(512)).all()
    with np.errstate(divide="raise"):
        assert len(sampled_rows(0, space)) == 0
    assert (sampled_rows(64, space, seed=1) != rows).any() and (sampled_rows(64, space) == rows).all()
