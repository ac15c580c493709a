"""Router: entropy, band penalty, balance loss and counters."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refractor_megatron.transformation.router import band_penalty, gate_entropy
from tests.engine import engine_of, plain_batch, tiny


def test_entropy_bounds() -> None:
    assert gate_entropy(torch.zeros(3, 8)).tolist() == pytest.approx([1.0] * 3)
    assert gate_entropy(torch.tensor([[100.0, 0, 0, 0]])).item() == pytest.approx(0.0, abs=1e-6)
    two_of_four = torch.tensor([[50.0, 50.0, 0, 0]])
    assert gate_entropy(two_of_four).item() == pytest.approx(math.log(2) / math.log(4), abs=1e-6)


@given(st.floats(0, 1))
def test_band_penalty_is_zero_exactly_inside(h: float) -> None:
    value = band_penalty(torch.tensor(h, dtype=torch.float64)).item()
    assert (value == 0) == (0.4 <= h <= 0.8)


def test_entropy_gradient_matches_finite_differences() -> None:
    """The surrogate attached in the graph has the gradient of λ · band(mean h)."""
    engine = engine_of(tiny("router.lb.lambda_kl=0", "router.lb.lambda_ent=1.0"))
    router = engine.routers[0]
    logits = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0)).double() * 0.1  # h near 1: above the band
    leaf = logits.clone().requires_grad_()
    entropy = gate_entropy(leaf.view(-1, 4).double())
    (found,) = torch.autograd.grad(router._entropy_loss(entropy), leaf)
    mean = lambda x: band_penalty(_entropy64(x).mean())  # noqa: E731
    twin = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(mean(twin), twin)
    assert expected.norm() > 1e-4
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def _entropy64(logits: torch.Tensor) -> torch.Tensor:
    log_p = torch.log_softmax(logits.view(-1, logits.shape[-1]), -1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1])


def test_every_token_is_counted_once_with_and_without_recomputation() -> None:
    """Recomputation runs forward twice; the counters must not notice, nor must the result."""
    results = []
    for recompute in ("none", "full"):
        cfg = tiny(f"train.recompute={recompute}")
        batch = plain_batch(cfg)
        results.append(engine_of(cfg).train_step(iter([batch]), 1, 1e-3, 0.1))
    experts, tokens = cfg.model.ffn.experts, batch.tokens.numel()
    for result in results:
        table = result.router
        assert table.shape == (cfg.model.n_layers, experts + 2)
        assert (table[:, experts + 1] == tokens).all()
        assert (table[:, :experts].sum(1) == tokens * cfg.model.ffn.topk).all()
    once, twice = results
    assert once.loss == twice.loss and once.grad_norm == pytest.approx(twice.grad_norm, rel=1e-6)
    assert torch.equal(once.router, twice.router)


def test_balance_loss_has_a_gradient_and_its_minimum_at_balance() -> None:
    """Switch form E·Σ u_e·P̄_e: 1 at balance, more when usage and probability agree on a favourite."""
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func

    def loss(probs: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros(4).index_add(0, probs.topk(2, -1).indices.flatten(), torch.ones(probs.shape[0] * 2))
        return switch_load_balancing_loss_func(probs, counts, probs.shape[0], 2, 4, 1.0)

    balanced = torch.eye(4).roll(0) * 0.5 + torch.eye(4).roll(1, 1) * 0.5
    skewed = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).repeat(4, 1).requires_grad_()
    assert loss(balanced).item() == pytest.approx(1.0)
    value = loss(skewed)
    assert value > 1.0
    value.backward()
    assert skewed.grad.norm() > 0
