"""With the window over the whole prefix and no summaries, our attention is Megatron's own DotProductAttention."""

from collections.abc import Callable

import pytest
import torch

from tests.engine import engine_of, plain_batch, tiny


@pytest.mark.parametrize("backend", ["dense", "blocksparse_cpu"])
@pytest.mark.parametrize("ffn", ["moe", "dense"])
def test_logits_and_gradients_match(backend: str, ffn: str, record_property: Callable[[str, object], None]) -> None:
    overrides = ["relation.local.window=128", f"relation.backend={backend}", f"model.ffn.type={ffn}"]
    cfg = tiny(*overrides)
    batch = plain_batch(cfg)
    ours, stock = engine_of(cfg), engine_of(cfg, stock_attention=True)
    # Megatron's mask: True = hidden, [1, 1, s, s]; ours travels as records in the same argument
    s = cfg.train.seq_len
    hidden = torch.ones(s, s, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(s).expand_as(batch.tokens)

    def run(engine: object, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = engine.model
        decoder_input = model.embedding(batch.tokens, positions, tokentype_ids=batch.records[..., 2].long())
        logits = super(type(model), model).forward(batch.tokens, positions, mask, decoder_input=decoder_input)
        model.zero_grad()
        (logits.float() ** 2).mean().backward()
        return logits.detach(), {n: p.main_grad.clone() for n, p in model.named_parameters()}

    (a, a_grads), (b, b_grads) = run(ours, batch.records), run(stock, hidden)
    logits = (a - b).abs().max().item()
    assert a_grads.keys() == b_grads.keys()
    errors = {n: ((g - b_grads[n]).norm() / b_grads[n].norm().clamp_min(1e-12)).item() for n, g in a_grads.items()}
    record_property("max abs logit difference", f"{logits:.1e}")
    record_property("max relative gradient error", f"{max(errors.values()):.1e}")
    assert logits <= 1e-5
    assert max(errors.values()) <= 1e-4, max(errors, key=lambda n: errors[n])
