"""The engine's reported loss is the mean over all tokens of the global batch, however many micro-batches carry it."""

import pytest
import torch

from tests.engine import engine_of, plain_batch, tiny


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_reported_loss_is_the_mean_of_the_token_losses(micro_batches: int) -> None:
    """Upstream's schedule divides the loss tensor in place; reported by reference it would be short by that."""
    cfg = tiny()
    engine = engine_of(cfg)
    batches = [plain_batch(cfg, seed) for seed in range(micro_batches)]
    expected = torch.stack([engine.token_losses(batch) for batch in batches]).double().mean().item()
    assert engine.eval_loss(iter(batches), micro_batches) == pytest.approx(expected, abs=1e-5)
    assert engine.train_step(iter(batches), micro_batches, 1e-3, 0.0).loss == pytest.approx(expected, abs=1e-5)
