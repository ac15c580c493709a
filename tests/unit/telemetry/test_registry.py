"""The metric table accepts exactly what it names."""

from __future__ import annotations

import pytest

from refractor_megatron.telemetry.registry import EVAL_METRICS, STEP_METRICS, MetricRegistry, MetricSpec


def test_registered_names_and_kinds_pass() -> None:
    step = {"loss": 4.5, "tokens_seen": 4096, "expert_load": [0.25, 0.75], "router_entropy_layer": []}
    evaluation = {"loss": 4.5, "bits_per_byte": 1.9, "tokens": 100}
    for registry, metrics in ((STEP_METRICS, step), (EVAL_METRICS, evaluation)):
        registry.check(metrics)
        assert metrics.keys() < {spec.name for spec in registry}


@pytest.mark.parametrize(
    "metrics",
    [{"los": 1.0}, {"loss": [1.0]}, {"expert_load": 1.0}, {"expert_load": ["x"]}, {"loss": "4"}, {"loss": True}],
)
def test_unregistered_name_or_wrong_shape_is_an_assertion(metrics: dict[str, object]) -> None:
    with pytest.raises(AssertionError, match=next(iter(metrics))):
        STEP_METRICS.check(metrics)  # type: ignore[arg-type]


def test_every_spec_is_described() -> None:
    for spec in [*STEP_METRICS, *EVAL_METRICS]:
        assert spec.unit and len(spec.meaning) > 10
    assert "mfu" in STEP_METRICS and STEP_METRICS["mfu"].kind == "gauge"


def test_masks_and_attention_are_registered_for_every_tier() -> None:
    tiers = ("summary", "retrieved", "local")
    shares = {f"attention_mass_{tier}": 0.3 for tier in tiers}
    layers = {f"attention_mass_{tier}_layer": [0.3, 0.4] for tier in tiers}
    EVAL_METRICS.check({**shares, **layers, "invalid_edges": 0, "mask_entropy": 0.9, "role_share": [0.1, 0.9]})
    with pytest.raises(AssertionError, match="attention_mass_local"):
        EVAL_METRICS.check({"attention_mass_local": [0.5]})


def test_registering_twice_or_misnaming_is_an_assertion() -> None:
    registry = MetricRegistry([MetricSpec("a", "1", "gauge", "a number")])
    with pytest.raises(AssertionError, match="twice"):
        registry.register(MetricSpec("a", "1", "gauge", "another number"))
    with pytest.raises(AssertionError, match="identifier"):
        MetricSpec("a b", "1", "gauge", "a number")
    with pytest.raises(AssertionError, match="axis"):
        MetricSpec("b", "1", "list", "numbers")
