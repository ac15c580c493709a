"""Change a token; positions that no chain of legal edges leads to keep their logits: all tiers, MoE, three layers.

In float64 with one thread: a matrix product may round a row differently when *other* rows change their number (an
expert receives another count of tokens), so rounding is told from leaking by size: 1e-12 against effects of order one.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from refractor_megatron.config import RunConfig
from refractor_megatron.distinction.closure import reachable
from refractor_megatron.distinction.lowerings import dense_legal
from refractor_megatron.distinction.roles import MaskBit
from refractor_megatron.engines.megatron import MegatronEngine
from refractor_megatron.fabric.retrieval import RetrievalBank
from tests.engine import engine_of, records_of, tiny

TOOL, SAFETY = int(MaskBit.TOOL_SCOPE), int(MaskBit.SAFETY_SCOPE)
RUNS = {
    "conversation": [
        (20, 0, 0, "system", 0),
        (24, 0, 0, "user", 0),
        (16, 0, 0, "tool", TOOL),
        (24, 0, 0, "assistant", 0),
        (20, 0, 0, "user", SAFETY),
        (24, 0, 0, "assistant", 0),
    ],
    "packed documents": [(50, 0, 0, "data", 0), (17, 1, 0, "data", 0), (61, 2, 0, "data", 0)],
    "segments": [(16, 0, 0, "system", 0), (40, 0, 1, "user", 0), (40, 0, 2, "user", 0), (32, 0, 3, "assistant", 0)],
}


#: What a variant adds to window 24, summaries by attention pooling and a joint softmax.
VARIANTS = {
    "default": [],
    "dilated, mean pooling, sum": [
        "relation.local={pattern: dilated, dilation: 2, dilation_unit: 8}",
        "relation.global={type: mean, block_size: 8}",
        "relation.combine=sum",
    ],
    "hybrid, max pooling, two levels": [
        "relation.local={pattern: hybrid, dilation: 2, dilation_unit: 4}",
        "relation.global={type: max, block_size: 8, levels: 2, fanout: 2}",
    ],
    "block, retrieval, gated": [
        "relation.local.pattern=block",
        "relation.combine=gated",
        "relation.retrieval={enabled: true, chunk: 8, fan_in: 3, dim: 16}",
    ],
    "stride, retrieval in one layer, gating features": [
        "relation.local.stride=4",
        "relation.retrieval={enabled: true, chunk: 16, fan_in: 2, dim: 16, layers: [2]}",
        "router.gate_features=true",
    ],
    "linear": ["relation.linear_mode={L_switch: 64}"],
    "random features": ["relation.linear_mode={L_switch: 64, kernel: favor+, features: 32}"],
}
RECORDS = 11
BANK = RetrievalBank(
    torch.randn(RECORDS, 16, generator=torch.Generator().manual_seed(5)).double(),
    np.arange(RECORDS, dtype=np.uint8) % 4,
    "test",
)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_unreachable_positions_keep_their_logits(
    name: str, variant: str, record_property: Callable[[str, object], None]
) -> None:
    leak, influenced = _change_tokens(name, VARIANTS[variant], record_property)
    assert leak <= 1e-12, "no path, no change"
    assert influenced > 100, "the test must see influence where influence is legal"


@pytest.mark.parametrize("name", RUNS)
def test_in_the_dense_backend_too(name: str, record_property: Callable[[str, object], None]) -> None:
    leak, influenced = _change_tokens(name, ["relation.backend=dense"], record_property)
    assert leak <= 1e-12 and influenced > 100


def _change_tokens(
    name: str, overrides: list[str], record_property: Callable[[str, object], None]
) -> tuple[float, int]:
    """Changes every 17th token -> the largest change of a logit it cannot reach, how many positions it did change."""
    long = any("L_switch" in text for text in overrides)
    cfg = tiny("model.n_layers=3", "model.init_std=0.2", *([] if long else ["relation.local.window=24"]), *overrides)
    engine = engine_of(cfg, bank=BANK if cfg.relation.retrieval.enabled else None)
    engine.model.double()
    engine.config.params_dtype = torch.float64
    records = records_of(RUNS[name])
    assert records.shape[1] == cfg.train.seq_len
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, cfg.model.vocab_size, (1, cfg.train.seq_len), generator=generator)
    retrieve = _retrieval(cfg)
    base = _logits(engine, tokens, retrieve(tokens, records))
    reach = reachable(dense_legal(records[0], engine.rules))  # [query, key]
    seen, leak, exact, hidden_logits = 0, 0.0, 0, 0
    for position in range(3, cfg.train.seq_len, 17):
        changed = tokens.clone()
        changed[0, position] = (tokens[0, position] + 1) % cfg.model.vocab_size
        difference = (_logits(engine, changed, retrieve(changed, records)) - base).abs().amax(-1)[0]  # [s]
        hidden = ~reach[:, position]
        assert difference[hidden].max() <= 1e-12, f"token {position} leaks to {difference[hidden].argmax()}"
        leak = max(leak, difference[hidden].max().item())
        exact, hidden_logits = exact + int((difference[hidden] == 0).sum()), hidden_logits + int(hidden.sum())
        assert difference[position] > 1e-6, "the changed token must change its own logits"
        seen += int((difference[~hidden] > 1e-9).sum())
    record_property("largest change where no path leads", f"{leak:.1e}")
    record_property("of such positions unchanged bit for bit", f"{exact}/{hidden_logits}")
    record_property("positions changed where a path leads", seen)
    return leak, seen


def _retrieval(cfg: RunConfig) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Appends ids that depend on every token of the chunk before, as a search's do."""
    if not cfg.relation.retrieval.enabled:
        return lambda tokens, records: records
    chunk, fan_in = cfg.relation.retrieval.chunk, cfg.relation.retrieval.fan_in

    def retrieve(tokens: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        found = tokens[0].reshape(-1, chunk).sum(1)
        ids = torch.stack([(found * (3 * r + 1) + r) % RECORDS for r in range(fan_in)], 1).roll(1, 0)
        ids[0] = -1
        return torch.cat([records, ids.repeat_interleave(chunk, 0)[None].int()], dim=2)

    return retrieve


def _logits(engine: MegatronEngine, tokens: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1])[None]
    engine.model.eval()
    with torch.no_grad():
        out: torch.Tensor = engine.model(tokens, positions, records)
    return out
