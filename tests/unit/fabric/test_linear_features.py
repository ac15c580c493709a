"""Feature maps: FAVOR+ estimates the exponential kernel without bias, its draws are frozen, its scaling cancels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.fabric.linear import LinearMode, linear_attention, linear_plan_for
from refractor_megatron.fabric.linear.features import EluPlusOne, PositiveRandomFeatures, orthogonal_directions

D = 16
SCALE = D**-0.5


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def favor(features: int, seed: int = 0, layer: int = 1, heads: int = 1, d: int = D) -> PositiveRandomFeatures:
    mapped = LinearMode("favor+", features, seed).feature_map(layer, range(heads), d, d**-0.5)
    assert isinstance(mapped, PositiveRandomFeatures)
    return mapped


def kernel_estimates(features: int, draws: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[draws] unscaled estimates of exp(q . k / sqrt(d)); every draw is the head of another number."""
    mapped = favor(features, heads=draws)
    exponents = [mapped.exponents(x.expand(1, draws, 1, D)) for x in (q, k)]
    return (exponents[0] + exponents[1]).exp().mean(-1).flatten()


def test_favor_is_unbiased_and_its_error_falls_with_the_root_of_the_features() -> None:
    q, k = normal(0, D) / 2, normal(1, D) / 2
    exact = float((q @ k * SCALE).exp())
    errors = {}
    for features, draws in ((16, 1500), (256, 300)):
        estimates = kernel_estimates(features, draws, q, k)
        standard_error = float(estimates.std()) / draws**0.5
        assert abs(float(estimates.mean()) - exact) < 4 * standard_error
        assert standard_error < 0.05 * exact, "too coarse to see a bias"
        errors[features] = float(((estimates - exact) ** 2).mean().sqrt())
    assert 3 < errors[16] / errors[256] < 5.3


def test_orthogonal_rows_estimate_better_than_independent_ones() -> None:
    q, k = normal(2, D) / 2, normal(3, D) / 2
    exact = float((q @ k * SCALE).exp())
    independent = PositiveRandomFeatures(normal(4, 2000, D, D), SCALE)
    exponents = [independent.exponents(x.expand(1, 2000, 1, D)) for x in (q, k)]
    plain = (exponents[0] + exponents[1]).exp().mean(-1).flatten()
    orthogonal = kernel_estimates(D, 2000, q, k)
    assert float((orthogonal - exact).square().mean()) < 0.9 * float((plain - exact).square().mean())


def test_many_features_give_softmax_attention() -> None:
    records = torch.zeros(1, 96, 4, dtype=torch.int32)
    plan = linear_plan_for(records, compile_rules([]))
    q, k, v = normal(0, 1, 2, 96, D) / 2, normal(1, 1, 2, 96, D) / 2, normal(2, 1, 2, 96, D)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    errors = [float((linear_attention(q, k, v, plan, favor(m, heads=2)) - exact).std()) for m in (64, 4096)]
    assert errors[1] < 0.02 and 5 < errors[0] / errors[1] < 13, "the root of 4096 / 64 is 8"


def test_rows_are_orthogonal_within_a_block_and_as_long_as_normal_vectors() -> None:
    rows = orthogonal_directions(0, 0, 0, 3 * D + 5, D)
    assert rows.shape == (3 * D + 5, D)
    block = rows[D : 2 * D]
    products = block @ block.T
    assert np.abs(products - np.diag(np.diag(products))).max() < 1e-12
    squares = np.concatenate([(orthogonal_directions(0, 0, head, 256, D) ** 2).sum(1) for head in range(20)])
    assert squares.mean() == pytest.approx(D, rel=0.02) and squares.var() == pytest.approx(2 * D, rel=0.1)


def test_the_draw_is_frozen() -> None:
    """A checkpoint holds no features: another stream of random numbers would silently change a trained model."""
    frozen = [0.1534826007882442, -0.238720296733792]
    assert orthogonal_directions(7, 2, 3, 5, 4)[[0, 4], 0] == pytest.approx(frozen, rel=1e-12, abs=0)


def test_every_grid_has_the_same_features() -> None:
    whole = favor(32, heads=4).directions
    half = LinearMode("favor+", 32).feature_map(1, [2, 3], D, SCALE)
    assert isinstance(half, PositiveRandomFeatures) and torch.equal(half.directions, whole[2:])
    others = [favor(32, seed=1).directions[0], favor(32, layer=2).directions[0], whole[1]]
    assert all(not torch.equal(whole[0], other) for other in others)


def test_scaling_is_one_factor_per_query_and_one_for_all_keys() -> None:
    mapped = favor(32, heads=2)
    x = normal(0, 1, 2, 50, D)
    exponents = mapped.exponents(x)
    key = mapped.key(x).log() - exponents
    assert torch.allclose(key, key[:, :, :1, :1].expand_as(key), atol=1e-10)
    query = mapped.query(x).log() - exponents
    assert torch.allclose(query, query[..., :1].expand_as(query), atol=1e-10)


@pytest.mark.parametrize("size", [0.0, 1.0, 8.0, 100.0])
def test_float32_stays_finite_for_inputs_of_any_size(size: float) -> None:
    plan = linear_plan_for(torch.zeros(1, 300, 4, dtype=torch.int32), compile_rules([]))
    q, k, v = ((normal(i, 1, 1, 300, 64) * scale).float() for i, scale in enumerate((size, size, 1.0)))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = linear_attention(*leaves, plan, favor(128, d=64))
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert all(bool(x.isfinite().all()) for x in (out, *grads))
    assert float(out.detach().abs().max()) <= float(v.detach().abs().max()) * 1.001, "rows are averages of values"


def test_a_key_as_long_as_a_direction_does_not_overflow() -> None:
    """The largest exponent there is: x' = w."""
    mapped = favor(256, d=128)
    longest = mapped.directions[0, mapped.directions[0].square().sum(-1).argmax()] / mapped.scale**0.5
    top = mapped.key(longest.float().reshape(1, 1, 1, 128)).max()
    assert float(top.log()) == pytest.approx(60, abs=1e-3)


def test_elu_plus_one() -> None:
    x = torch.tensor([-60.0, -1.0, 0.0, 2.5])
    assert EluPlusOne(4).query(x).tolist() == pytest.approx([math.exp(-60), math.exp(-1), 1.0, 3.5], rel=1e-6)
    assert float(F.elu(x)[0] + 1) == 0, "the literal formula loses small weights"
