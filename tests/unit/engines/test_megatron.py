"""The reported loss, steps whose numbers are not finite, and records that do not fit the tokens."""

import math

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


@pytest.mark.parametrize("overrides", [[], ["relation.backend=dense"], ["relation.linear_mode={L_switch: 64}"]])
def test_keys_that_are_no_numbers_show_in_the_loss_and_skip_the_step(overrides: list[str]) -> None:
    """Caught once: linear attention turned them into zeros, and an evaluation looked healthy."""
    cfg = tiny(*overrides)
    engine = engine_of(cfg)
    head = cfg.model.d_model // cfg.model.n_heads
    group = cfg.model.n_heads // cfg.model.n_kv_heads
    qkv = engine.model.decoder.layers[0].self_attention.linear_qkv.weight.data  # per group: queries, key, value
    qkv[group * head : (group + 1) * head] = torch.nan
    before = {name: weight.detach().clone() for name, weight in engine.model.named_parameters()}
    result = engine.train_step(iter([plain_batch(cfg)]), 1, 1e-2, 0.0)
    assert not result.applied and math.isnan(result.loss) and math.isnan(engine.eval_loss(iter([plain_batch(cfg)]), 1))
    assert all(torch.equal(w.nan_to_num(), before[name].nan_to_num()) for name, w in engine.model.named_parameters())


def test_a_gradient_that_is_not_finite_skips_the_step_though_the_loss_is() -> None:
    cfg = tiny()
    engine = engine_of(cfg)
    engine.accumulate(iter([plain_batch(cfg)]), 1)
    engine.ddp.buffers[0].grad_data[3] = torch.inf
    before = [weight.detach().clone() for weight in engine.model.parameters()]
    assert not engine.apply(6.9, 1e-2, 0.0).applied
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))


@pytest.mark.parametrize("length", [64, 127, 256])
def test_records_of_another_length_are_our_mistake(length: int) -> None:
    cfg = tiny()
    batch = plain_batch(cfg)
    with pytest.raises(AssertionError, match=rf"records of .* for {cfg.train.seq_len} tokens"):
        engine_of(cfg).logits(batch.tokens, torch.zeros(len(batch.tokens), length, 4, dtype=torch.int32))
