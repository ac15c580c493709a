"""A Megatron model on this process and its twin in plain torch, with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refractor_megatron.checkpoint.convert.mapping import table, to_hf
from refractor_megatron.checkpoint.convert.shape import Shape
from refractor_megatron.config import RunConfig
from refractor_megatron.engines.megatron import MegatronEngine
from refractor_megatron.hf.from_run import hf_config
from refractor_megatron.hf.modeling_refractor import RefractorForCausalLM
from refractor_megatron.transformation.sharded import shards


def megatron_tensors(model: Any, of: Callable[[Tensor], Tensor] = lambda p: p.data) -> dict[str, Tensor]:
    """Whole tensors by checkpoint key of a model that lives on this process alone; ``of``: weight, gradient, ..."""
    whole: dict[str, Tensor] = {}
    for shard in shards(model, of):
        full = whole.setdefault(shard.key, torch.zeros(shard.global_shape, dtype=shard.data.dtype))
        full[shard.index] = shard.data.reshape(full[shard.index].shape)
    return whole


def hf_tensors(cfg: RunConfig, model: Any, of: Callable[[Tensor], Tensor] = lambda p: p.data) -> dict[str, Tensor]:
    """The same under the names of the model in plain torch, without padding rows."""
    found = to_hf(table(Shape.of_run(cfg)), megatron_tensors(model, of))
    return {name: tensor for name, tensor in found.items() if not name.endswith(".padding")}


def twin(cfg: RunConfig, engine: MegatronEngine) -> RefractorForCausalLM:
    """The model in plain torch with the engine's weights."""
    model = RefractorForCausalLM(hf_config(cfg, None)).to(engine.config.params_dtype)
    state = hf_tensors(cfg, engine.model)
    if cfg.model.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()
