"""Tier C in the model: records matter, their projections learn, the bank does not; gates start even."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from refractor_megatron.config.relation_limits import local_reach
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.engines.base import Batch
from refractor_megatron.fabric.measure import AttentionProbe, probing
from refractor_megatron.fabric.plan import plan_for
from refractor_megatron.fabric.retrieval import RetrievalBank
from refractor_megatron.transformation import core_attention
from refractor_megatron.transformation.layer_plan import plan_layers
from tests.engine import engine_of, plain_batch, tiny

RETRIEVAL = "relation.retrieval={enabled: true, chunk: 32, fan_in: 2, dim: 8, layers: [2]}"


def bank(seed: int = 0) -> RetrievalBank:
    vectors = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
    return RetrievalBank(vectors, np.full(5, 3, dtype=np.uint8), "test")


def with_ids(batch: Batch, first_chunk: int = 1) -> Batch:
    b, s, _ = batch.records.shape
    ids = torch.full((b, s, 2), -1, dtype=torch.int32)
    ids[:, first_chunk * 32 :, 0] = 3
    ids[:, first_chunk * 32 :, 1] = 1
    return Batch(batch.tokens, batch.labels, torch.cat([batch.records, ids], dim=2))


def test_records_reach_the_loss_and_gradients_stop_at_the_projections() -> None:
    cfg = tiny(RETRIEVAL, "model.init_std=0.2")
    records = bank()
    engine = engine_of(cfg, bank=records)
    batch = with_ids(plain_batch(cfg))
    engine.accumulate(iter([batch]), 1)
    layers = engine.model.decoder.layers
    assert layers[0].self_attention.core_attention.retrieved_key is None, "layer 1 reads no records"
    core = layers[1].self_attention.core_attention
    assert core.retrieved_key.main_grad.abs().max() > 0 and core.retrieved_value.main_grad.abs().max() > 0
    assert not records.vectors.requires_grad and records.vectors.grad is None
    assert "retrieved_key" in "".join(engine.model_state()) and "vectors" not in "".join(engine.model_state())


def test_a_chunk_reads_what_the_chunk_before_retrieved_and_nothing_earlier_notices() -> None:
    cfg = tiny(RETRIEVAL, "model.init_std=0.2")
    engine = engine_of(cfg, bank=bank())
    batch = plain_batch(cfg)
    none = engine.logits(batch.tokens, with_ids(batch, first_chunk=4).records)
    some = engine.logits(batch.tokens, with_ids(batch, first_chunk=2).records)
    assert torch.equal(none[:, :64], some[:, :64]) and (none[:, 64:] - some[:, 64:]).abs().max() > 1e-3


def test_gates_begin_even() -> None:
    """Zero logits: every tier at one half, so a gated model starts as half the sum."""
    logits = {}
    for combine in ("sum", "gated"):
        cfg = tiny(f"relation.combine={combine}", "model.n_layers=1")
        engine = engine_of(cfg)
        core = engine.model.decoder.layers[0].self_attention.core_attention
        batch = plain_batch(cfg)
        q = torch.randn(cfg.train.seq_len, batch.tokens.shape[0], 4, 16, generator=torch.Generator().manual_seed(1))
        k, v = q[:, :, :2] + 1, q[:, :, 2:] - 1
        torch.nn.init.zeros_(core.summary_query)
        logits[combine] = core(q, k, v, batch.records)
    assert torch.allclose(logits["gated"], logits["sum"] / 2, atol=1e-6)


@pytest.mark.parametrize(
    "local", ["window: 24", "pattern: block", "pattern: dilated, dilation_unit: 4, dilation: 3", "stride: 5"]
    + [f"pattern: hybrid, window: {w}, dilation_unit: {u}, dilation: 2" for w, u in ((24, 4), (9, 2), (32, 16))],
)  # fmt: skip
def test_the_reach_that_limits_check_is_that_of_the_pattern(local: str) -> None:
    cfg = tiny(f"relation.local={{{local}}}")
    assert local_reach(cfg.values()) == plan_layers(cfg).attention[0].mask.local.reach(cfg.train.seq_len)


def test_the_plan_reads_only_what_has_an_effect() -> None:
    """A key without effect under the other settings stays unread, so that setting it is refused."""
    cases = {
        (): {"relation.local.stride"},
        ("relation.local={pattern: dilated, dilation_unit: 8}",): {
            "relation.local.dilation",
            "relation.local.dilation_unit",
        },
        ("relation.global={levels: 2, fanout: 2}",): {"relation.global.fanout"},
        (RETRIEVAL,): {"relation.retrieval.chunk", "relation.retrieval.layers", "relation.retrieval.dim"},
        ("relation.linear_mode={L_switch: 64, kernel: favor+}",): {"relation.linear_mode.features"},
        ("model.rope.scaling=yarn",): {"model.rope.beta_fast", "model.rope.beta_slow"},
    }
    everything = set().union(*cases.values())
    for overrides, used in cases.items():
        cfg = tiny(*overrides)
        plan_layers(cfg)
        sliding = {"relation.local.stride"} if not any("local" in o or "L_switch" in o for o in overrides) else set()
        assert cfg.read_keys() & everything == used | sliding, overrides


@pytest.mark.parametrize("combine", ["joint", "sum", "gated"])
def test_the_probe_sees_the_plans_that_run(combine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tier's own plan where tiers have softmaxes of their own; a wrong one of them is found."""
    cfg = tiny(f"relation.combine={combine}", "relation.local.window=24", "model.n_layers=1")
    engine, batch, cpu = engine_of(cfg), plain_batch(cfg), torch.device("cpu")
    spec = engine.plan.attention[0].mask
    batch.records[:, 100:, 0] = -1

    def measured() -> dict[str, float]:
        with probing(engine.model, AttentionProbe(layers=1, rows=0, seed=0), cpu) as probe:
            engine.logits(batch.tokens, batch.records)
        return probe.plan_metrics(batch.tokens.numel())

    whole = plan_for(batch.records, engine.rules, spec)
    alone = [plan_for(batch.records, engine.rules, spec.only(tier)) for tier in spec.present]
    visited = sum(plan.layout.visited_pairs for plan in ([whole] if combine == "joint" else alone))
    metrics = measured()
    assert metrics["visited_share"] == pytest.approx(visited / whole.stats.causal_pairs)
    assert metrics["edges_used_share"] == whole.stats.legal_edges / whole.stats.causal_pairs
    assert metrics["masked_rows"] == whole.stats.fully_masked_rows and metrics["invalid_edges"] == 0

    def wider(records, rules, mask, *rest):  # type: ignore[no-untyped-def]
        """Local tiers that run alone read four keys too many."""
        plan = plan_for(records, rules, mask, *rest)
        if mask != spec.only("local"):
            return plan
        other = plan_for(records, rules, replace(mask, local=LocalPattern(window=28)), *rest)
        return replace(plan, samples=other.samples, layout_key=other.layout_key)

    monkeypatch.setattr(core_attention, "plan_for", wider)
    assert (measured()["invalid_edges"] > 0) == (combine != "joint")
