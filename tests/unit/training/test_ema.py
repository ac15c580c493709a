"""Weight EMA: the formula, and the swap that leaves no trace."""

import pytest
import torch

from refractor_megatron.training.ema import WeightEMA
from tests.engine import engine_of, plain_batch, tiny


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_formula_and_swap(precision: str) -> None:
    cfg = tiny(f"train.mixed_precision={precision}")
    engine = engine_of(cfg)
    ema = WeightEMA(engine.model, decay=0.9)
    expected = {n: p.detach().double() for n, p in engine.model.named_parameters()}
    for step in range(1, 5):
        engine.train_step(iter([plain_batch(cfg, step)]), 1, 1e-2, 0.0)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, parameter in engine.model.named_parameters():
            master = getattr(parameter, "main_param", parameter).detach().double()
            expected[name] = decay * expected[name] + (1 - decay) * master
    for name, average in ema.average.items():
        assert average.dtype == torch.float32
        assert torch.allclose(average.double(), expected[name], rtol=1e-5, atol=1e-7), name
    raw = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    held = {n: t.clone() for n, t in ema.average.items()}
    with ema.swapped_in():
        for name, parameter in engine.model.named_parameters():
            assert torch.equal(parameter, held[name].to(parameter.dtype))
        assert any(not torch.equal(p, raw[n]) for n, p in engine.model.named_parameters())
    assert all(torch.equal(p, raw[n]) for n, p in engine.model.named_parameters())
    assert all(torch.equal(t, held[n]) for n, t in ema.average.items())


def test_swap_back_after_an_error() -> None:
    engine = engine_of(tiny())
    ema = WeightEMA(engine.model, 0.9)
    ema.average = {n: t + 1 for n, t in ema.average.items()}
    raw = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    with pytest.raises(ZeroDivisionError), ema.swapped_in():
        raise ZeroDivisionError
    assert all(torch.equal(p, raw[n]) for n, p in engine.model.named_parameters())
