"""Documents packed into one sequence never see each other: each has the logits of a dense run of its own.

In float64, up to the rotary angles: they are float32, and a packed document stands elsewhere than one alone.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from refractor_megatron.engines.megatron import MegatronEngine
from tests.engine import engine_of, records_of, tiny

#: Lengths in tokens; the blocks of 16 begin anew with each document, as they do when it stands alone.
DOCUMENTS = (48, 16, 64)


@pytest.mark.parametrize("relation", ["nano", "dense"])
def test_packed_documents_equal_documents_alone(relation: str) -> None:
    engine = engine_of(tiny("model.n_layers=3", "model.init_std=0.2", f"relation={relation}"))
    engine.model.double()
    engine.config.params_dtype = torch.float64
    packed = records_of([(length, i, i, "data", 0) for i, length in enumerate(DOCUMENTS)])
    tokens = torch.randint(0, 500, (1, packed.shape[1]), generator=torch.Generator().manual_seed(3))
    together = logits(engine, tokens, packed)
    use_dense_backend(engine)
    at = 0
    for length in DOCUMENTS:
        alone = logits(engine, tokens[:, at : at + length], records_of([(length, 0, 0, "data", 0)]))
        assert (together[:, at : at + length] - alone).abs().max() <= 1e-5
        at += length
    # The comparison is not vacuous: read as one document the same tokens have other logits.
    joined = logits(engine, tokens, records_of([(sum(DOCUMENTS), 0, 0, "data", 0)]))
    assert (joined[:, DOCUMENTS[0] :] - together[:, DOCUMENTS[0] :]).abs().max() > 1e-3


def use_dense_backend(engine: MegatronEngine) -> None:
    for layer in engine.model.decoder.layers:
        core = layer.self_attention.core_attention
        core.plan = dataclasses.replace(core.plan, backend="dense")


def logits(engine: MegatronEngine, tokens: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
    engine.model.eval()
    with torch.no_grad():
        out: torch.Tensor = engine.model(tokens, torch.arange(tokens.shape[1])[None], records)
    return out
