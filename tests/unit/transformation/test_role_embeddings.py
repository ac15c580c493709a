"""Role embeddings: the table's row is added exactly where the role is. Golden values of a small model.

``golden/role_embeddings.json`` was made by this file (``python -m tests.unit.transformation.test_role_embeddings``
prints it) from seed 7 of ``initialise`` and a role table of plain numbers; a change of either must be noticed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refractor_megatron.distinction.roles import ROLE_ID, ROLES
from refractor_megatron.engines.megatron import MegatronEngine
from tests.engine import engine_of, plain_batch, records_of, tiny

GOLDEN = Path(__file__).parent / "golden" / "role_embeddings.json"
#: (length, document, segment, role, mask bits): every role, and one that returns.
RUNS = [(2, 0, 0, "system", 0), (2, 0, 0, "user", 0), (1, 0, 0, "tool", 4), (1, 0, 1, "code", 0),
        (1, 0, 1, "data", 16), (2, 0, 1, "assistant", 0), (1, 1, 0, "user", 8)]  # fmt: skip
WIDTH = 4


def model() -> MegatronEngine:
    engine = engine_of(tiny("train.seed=7"))
    table = engine.model.embedding.tokentype_embeddings.weight
    with torch.no_grad():
        table.copy_((torch.arange(len(ROLES))[:, None] + 1) * torch.linspace(1, 2, table.shape[1])[None, :])
    return engine


def embedded(engine: MegatronEngine, tokens: Tensor, records: Tensor) -> Tensor:
    """What enters the first layer, [s, d_model]."""
    seen: list[Tensor] = []
    hook = engine.model.decoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    engine.logits(tokens, records)
    hook.remove()
    return seen[0][:, 0]


def inputs() -> tuple[Tensor, Tensor]:
    records = records_of(RUNS)
    return torch.arange(records.shape[1])[None] * 3 + 1, records


def observed() -> dict[str, Any]:
    engine = model()
    tokens, records = inputs()
    rows = embedded(engine, tokens, records)[:, :WIDTH]
    return {
        "tokens": tokens[0].tolist(),
        "roles": [ROLES[role] for role in records[0, :, 2]],
        "embedded": [[round(x, 6) for x in row] for row in rows.tolist()],
    }


def test_embeddings_equal_the_golden_values() -> None:
    golden, found = json.loads(GOLDEN.read_text()), observed()
    assert {key: golden[key] for key in ("tokens", "roles")} == {key: found[key] for key in ("tokens", "roles")}
    assert torch.allclose(torch.tensor(found["embedded"]), torch.tensor(golden["embedded"]), atol=2e-6, rtol=0)


def test_the_row_of_the_role_is_added_and_nothing_else() -> None:
    engine = model()
    tokens, records = inputs()
    words = engine.model.embedding.word_embeddings.weight[tokens[0]]
    table = engine.model.embedding.tokentype_embeddings.weight
    found = embedded(engine, tokens, records)
    assert torch.equal(found, words + table[records[0, :, 2].long()])
    changed = records.clone()
    changed[0, 4, 2] = ROLE_ID["user"]
    differs = (embedded(engine, tokens, changed) != found).any(1)
    assert differs.nonzero().flatten().tolist() == [4], "one token changed its role"
    changed[..., 0], changed[..., 1], changed[..., 3] = 0, 0, 31
    assert torch.equal((embedded(engine, tokens, changed) != found).any(1), differs), "only the role counts"


def test_plain_text_has_no_row_of_its_own_and_other_roles_learn_theirs() -> None:
    cfg = tiny("safety=open")
    engine = engine_of(cfg)
    batch = plain_batch(cfg)
    batch.records[:, 40:60, 2] = ROLE_ID["user"]
    engine.train_step(iter([batch]), 1, lr=1e-2, weight_decay=0.1)
    table = engine.model.embedding.tokentype_embeddings.weight
    learned = [name for name, row in zip(ROLES, table, strict=True) if row.any()]
    assert learned == ["user"]


if __name__ == "__main__":
    print(json.dumps(observed()))
