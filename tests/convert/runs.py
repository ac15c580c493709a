"""Run folders with random weights, made without training: what conversion tests start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from refractor_megatron.checkpoint.store import Store
from refractor_megatron.config import RunConfig
from refractor_megatron.fabric.retrieval import RetrievalBank
from refractor_megatron.tokenizer import Tokenizer
from refractor_megatron.tokenizer.tokenizer import SPECIALS
from refractor_megatron.training.state import TrainState
from tests.engine import engine_of, tiny

RETRIEVAL = [
    "relation.retrieval.enabled=true",
    "relation.retrieval.fan_in=2",
    "relation.retrieval.dim=16",
    "relation.retrieval.chunk=16",
    "relation.retrieval.layers=[1]",
]
ONE = ["model.ffn.experts=1", "model.ffn.topk=1"]
FULL = ["relation.local.window=4096", "model.n_kv_heads=4"]
#: Overrides of the nano preset that reach every entry of the table, name by name.
VARIANTS = {
    "moe": [],
    "tied": ["model.tie_embeddings=true", "model.vocab_size=515", "model.ffn.type=dense"],
    "padded": ["model.vocab_size=700", "model.ffn.activation=gelu"],
    "dense gelu": ["model.ffn.type=dense", "model.ffn.activation=gelu", "relation.global.type=mean"],
    "two levels": ["relation.global.levels=2", "relation.global.fanout=2"],
    "gated": ["relation.combine=gated", "router.gate_features=true", *RETRIEVAL],
    "separate": ["relation.combine=sum", "model.role_embeddings=false", "router.renormalize_topk=false", *ONE],
    "linear": ["relation.linear_mode.L_switch=64"],
    "stretched": ["model.rope.scaling=yarn", "model.rope.alpha=0.5", "model.rope.dim=32", *FULL],
}


def tokenizer_with(vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly this many ids."""
    pairs = [bytes([a, b]) for a in range(97, 123) for b in range(97, 123)]
    pairs += [bytes([a, b]) for a in range(65, 91) for b in range(97, 123)]
    return Tokenizer([bytes([b]) for b in range(256)] + pairs[: vocab_size - 256 - len(SPECIALS)])


def make_run(folder: Path, *overrides: str, step: int = 7, seed: int = 0) -> RunConfig:
    """A run folder with one checkpoint: random weights, another random average, optimizer state, a tokenizer."""
    cfg = tiny("train.ema.enabled=true", *overrides)
    generator = torch.Generator().manual_seed(seed)
    engine = engine_of(cfg, bank=bank_of(cfg))
    engine.ddp.zero_grad_buffer()
    engine.apply(0.0, lr=0.0, weight_decay=0.0)  # makes the moments, which a checkpoint holds beside the weights
    with torch.no_grad():
        for name, parameter in engine.model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            parameter.normal_(mean, 0.1, generator=generator)
    engine.optimizer.reload_model_params()
    state = TrainState(cfg, engine, "digest", "index" if cfg.relation.retrieval.enabled else None)
    assert state.ema is not None
    for name, average in state.ema.average.items():
        average.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    state.progress.step = step
    state.save(Store(folder / "checkpoints", 2))
    cfg.save(folder / "config.yaml")
    tokenizer_with(cfg.model.vocab_size).save(folder / "tokenizer.json")
    return cfg


def bank_of(cfg: RunConfig) -> RetrievalBank | None:
    """Records for an engine that is built but not run."""
    if not cfg.relation.retrieval.enabled:
        return None
    return RetrievalBank(torch.zeros(4, cfg.relation.retrieval.dim), np.zeros(4, np.uint8), "index")
