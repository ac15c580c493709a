"""Gating features in the expert router: silent at first, steering by role and scope, alive under recomputation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refractor_megatron.distinction.gating import GATE_FEATURES, gate_features
from refractor_megatron.distinction.roles import ROLE_ID, ROLES, MaskBit
from refractor_megatron.engines.base import Batch
from refractor_megatron.engines.megatron import MegatronEngine
from refractor_megatron.transformation.router import RefractorRouter
from refractor_megatron.transformation.sharded import shards
from tests.engine import engine_of, plain_batch, tiny

ON = "router.gate_features=true"


def mixed_batch(samples: int = 2) -> Batch:
    """Random tokens whose roles and scope bits change every eight tokens."""
    cfg = tiny()
    batch = plain_batch(cfg, samples=samples)
    block = torch.arange(cfg.train.seq_len) // 8
    batch.records[..., 2] = block % len(ROLES)
    batch.records[..., 3] = torch.where(block % 4 == 3, int(MaskBit.RET_SCOPE), 0)
    return batch


def spy(router: RefractorRouter) -> list[Tensor]:
    """The logits that a router will compute, [s, b, E], added as they come."""
    seen: list[Tensor] = []
    inner = router.gating

    def gating(hidden: Tensor) -> Tensor:
        seen.append(inner(hidden))
        return seen[-1]

    router.gating = gating  # type: ignore[method-assign]
    return seen


def features_of(batch: Batch) -> Tensor:
    return gate_features(batch.records).transpose(0, 1)  # [s, b, K_g]


def test_features_are_role_and_scope() -> None:
    assert (*ROLES, "TOOL_SCOPE", "SAFETY_SCOPE", "RET_SCOPE") == GATE_FEATURES
    records = torch.tensor([[[7, 1, ROLE_ID["tool"], int(MaskBit.TOOL_SCOPE | MaskBit.SEGMENT), -1]]])
    row = gate_features(records)[0, 0]
    assert row.dtype == torch.float32
    assert [GATE_FEATURES[i] for i in row.nonzero().flatten()] == ["tool", "TOOL_SCOPE"]


def test_a_zero_table_changes_nothing_and_every_router_has_one() -> None:
    batch = mixed_batch()
    plain, gated = engine_of(tiny()), engine_of(tiny(ON))
    keys = {shard.key for shard in shards(gated.model)} - {shard.key for shard in shards(plain.model)}
    assert len(keys) == len(gated.routers) == 2 and all(key.endswith("mlp.router.feature_weight") for key in keys)
    assert all((router.feature_weight == 0).all() for router in gated.routers)
    assert torch.equal(plain.token_losses(batch), gated.token_losses(batch))


def test_the_table_steers_its_role_alone() -> None:
    batch = mixed_batch()
    engine = engine_of(tiny(ON))
    router = engine.routers[0]
    before, after = spy(router), []
    engine.token_losses(batch)
    with torch.no_grad():
        router.feature_weight[2, GATE_FEATURES.index("user")] = 1000.0
    engine.token_losses(batch)
    before, after = before[0], before[1]
    users = (batch.records[..., 2] == ROLE_ID["user"]).T
    assert torch.equal(before[~users], after[~users])
    assert (after[users].argmax(-1) == 2).all()
    assert torch.equal(after - before, (features_of(batch) @ router.feature_weight.T).to(before.dtype))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_gradient_gathers_the_logits_gradient_by_feature(recompute: str) -> None:
    batch = mixed_batch()
    engine = engine_of(tiny(ON, f"train.recompute={recompute}"))
    seen = spy(engine.routers[1])
    gradient = _gradient(engine, batch, seen)
    logits = seen[-1]  # of the pass that recorded the graph
    assert len(seen) == (2 if recompute == "full" else 1) and logits.grad is not None
    expected = torch.einsum("sbe,sbk->ek", logits.grad, features_of(batch))
    assert expected.norm() > 0 and torch.allclose(gradient, expected, rtol=1e-4, atol=1e-9)
    assert engine.routers[1]._records is None, "records are lent, not kept"


def _gradient(engine: MegatronEngine, batch: Batch, seen: list[Tensor]) -> Tensor:
    """Gradient of the second router's table, with the logits' own kept on them."""
    router, inner = engine.routers[1], engine.routers[1].gating

    def gating(hidden: Tensor) -> Tensor:
        logits = inner(hidden)
        if logits.requires_grad:
            logits.retain_grad()
        return logits

    router.gating = gating  # type: ignore[method-assign]
    engine.accumulate(iter([batch]), 1)
    return router.feature_weight.main_grad.clone()


def test_both_passes_of_recomputation_agree() -> None:
    batch = mixed_batch()
    results = [engine_of(tiny(ON, f"train.recompute={mode}")).train_step(iter([batch]), 1, 1e-3, 0.1)
               for mode in ("none", "full")]  # fmt: skip
    assert results[0].loss == results[1].loss
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-6)


def test_a_router_without_records_is_our_mistake() -> None:
    router = engine_of(tiny(ON)).routers[0]
    with pytest.raises(AssertionError, match="records of its tokens"):
        router.gating(torch.zeros(4, 1, tiny().model.d_model))
    with router.lend_records(torch.zeros(1, 3, 4, dtype=torch.int32)), pytest.raises(AssertionError, match="1, 3"):
        router.gating(torch.zeros(4, 1, tiny().model.d_model))
