"""Initialisation by name: a function of (seed, key) alone."""

import torch

from refractor_megatron.transformation.sharded import shards
from tests.engine import engine_of, tiny


def test_same_seed_same_weights_other_seed_other_weights() -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        return {s.key: s.data.clone() for s in shards(engine_of(tiny(f"train.seed={seed}")).model)}

    a, b, c = weights(1), weights(1), weights(2)
    assert all(torch.equal(a[k], b[k]) for k in a)
    moved = [k for k in a if "norm" not in k and "tokentype" not in k]
    assert moved and not any(torch.equal(a[k], c[k]) for k in moved)


def test_deeper_models_keep_the_weights_of_their_first_layers() -> None:
    shallow = {s.key: s.data for s in shards(engine_of(tiny("model.n_layers=2")).model)}
    deep = {s.key: s.data for s in shards(engine_of(tiny("model.n_layers=3")).model)}
    same = [
        k
        for k in shallow
        if "norm" not in k and "tokentype" not in k and "linear_proj" not in k and "linear_fc2" not in k
    ]
    assert same and all(torch.equal(shallow[k], deep[k]) for k in same)


def test_scales() -> None:
    cfg = tiny("model.init_std=0.05", "model.n_layers=2")
    found = {s.key: s.data for s in shards(engine_of(cfg).model)}
    embedding = found["embedding.word_embeddings.weight"]
    assert abs(embedding.std().item() - 0.05) < 0.002
    projection = next(v for k, v in found.items() if k.endswith("linear_proj.weight"))
    assert abs(projection.std().item() - 0.025) < 0.002
    assert all((v == 1).all() for k, v in found.items() if "norm" in k)
    assert (found["embedding.tokentype_embeddings.weight"] == 0).all()
