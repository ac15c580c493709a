"""Change a token; positions that no chain of legal edges leads to keep their logits: tiers A and B, MoE, three layers.

In float64 with one thread: a matrix product may round a row differently when *other* rows change their number (an
expert receives another count of tokens), so rounding is told from leaking by size: 1e-12 against effects of order one.
"""

from collections.abc import Callable

import pytest
import torch

from refractor_megatron.distinction.closure import reachable
from refractor_megatron.distinction.lowerings import dense_legal
from refractor_megatron.distinction.roles import MaskBit
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


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("backend", ["dense", "blocksparse_cpu"])
def test_unreachable_positions_keep_their_logits(
    name: str, backend: str, record_property: Callable[[str, object], None]
) -> None:
    cfg = tiny("model.n_layers=3", f"relation.backend={backend}", "relation.local.window=24", "model.init_std=0.2")
    engine = engine_of(cfg)
    engine.model.double()
    engine.config.params_dtype = torch.float64
    records = records_of(RUNS[name])
    assert records.shape[1] == cfg.train.seq_len
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, cfg.model.vocab_size, (1, cfg.train.seq_len), generator=generator)
    base = _logits(engine, tokens, records)
    reach = reachable(dense_legal(records[0], engine.rules))  # [query, key]
    seen, leak, exact, hidden_logits = 0, 0.0, 0, 0
    for position in range(3, cfg.train.seq_len, 17):
        changed = tokens.clone()
        changed[0, position] = (tokens[0, position] + 1) % cfg.model.vocab_size
        difference = (_logits(engine, changed, records) - base).abs().amax(-1)[0]  # [s]
        hidden = ~reach[:, position]
        assert difference[hidden].max() <= 1e-12, f"token {position} leaks to {difference[hidden].argmax()}"
        leak = max(leak, difference[hidden].max().item())
        exact, hidden_logits = exact + int((difference[hidden] == 0).sum()), hidden_logits + int(hidden.sum())
        assert difference[position] > 1e-6, "the changed token must change its own logits"
        seen += int((difference[~hidden] > 1e-9).sum())
    record_property("largest change where no path leads", f"{leak:.1e}")
    record_property("of such positions unchanged bit for bit", f"{exact}/{hidden_logits}")
    record_property("positions changed where a path leads", seen)
    assert seen > 100, "the test must see influence where influence is legal"


def _logits(engine: object, tokens: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1])[None]
    engine.model.eval()
    with torch.no_grad():
        return engine.model(tokens, positions, records)
