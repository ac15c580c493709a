"""The first weights of a run, taken from another run's checkpoint of any grid: the ranks' half of ``--weights``.

Weights that both models have are loaded; their shapes must agree. Weights that only this model has stay as they were
initialised, but only parts that REFRACTOR adds to a decoder may be new: the tiers, the gates and the role table, which
is how a model of plain attention is continued with long context. Weights that only the source has would be lost, so
they are refused. The optimizer starts afresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..checkpoint.store import Store
from ..compat.megatron import dist_checkpointing
from ..config import RunConfig
from ..config.schema import as_text
from ..engines.megatron import MegatronEngine
from ..errors import CheckpointError
from ..transformation.sharded import sharded_tensors, shards
from .weights import StartWeights

Shapes = Mapping[str, tuple[int, ...]]

#: What REFRACTOR adds to a decoder, by the end of the tensor's name, and the keys that turn it on.
ADDED: dict[str, tuple[str, ...]] = {
    "tokentype_embeddings.weight": ("model.role_embeddings",),
    "summary_query": (
        "relation.global.summaries_per_block", "relation.global.type", "relation.local.window", "train.seq_len",
    ),
    "group_query": ("relation.global.levels",),
    "retrieved_key": ("relation.retrieval.enabled", "relation.retrieval.layers", "relation.retrieval.dim"),
    "retrieved_value": ("relation.retrieval.enabled", "relation.retrieval.layers", "relation.retrieval.dim"),
    "tier_gate_bias": ("relation.combine", "relation.global.summaries_per_block", "relation.retrieval.enabled"),
    "tier_gate_weight": ("relation.combine", "relation.global.summaries_per_block", "relation.retrieval.enabled"),
    "router.feature_weight": ("router.gate_features",),
}  # fmt: skip
#: Keys that shape every other tensor, by a part of its name; the first that fits counts.
_SHAPED_BY: dict[str, tuple[str, ...]] = {
    "word_embeddings": ("model.vocab_size", "model.d_model"),
    "output_layer": ("model.tie_embeddings", "model.vocab_size", "model.d_model"),
    "layernorm": ("model.d_model",),
    "layer_norm": ("model.d_model",),
    "linear_qkv": ("model.n_heads", "model.n_kv_heads", "model.d_model"),
    "linear_proj": ("model.d_model",),
    "mlp.": ("model.ffn.type", "model.ffn.experts", "model.ffn.hidden", "model.ffn.activation", "model.d_model"),
}
#: First parts of the names of weights; the rest of a checkpoint is EMA and optimizer state.
_MODEL = ("embedding.", "decoder.", "output_layer.")
_SHAPES_ALL = ("model.n_layers", "model.d_model", "model.n_heads", "model.n_kv_heads")


def load_first_weights(cfg: RunConfig, engine: MegatronEngine, store: Store, start: StartWeights) -> list[str]:
    """Load the weights of ``start``; returns the names of the tensors that stay as they were initialised.

    Raises:
        CheckpointError: on every rank; the checkpoint is gone or damaged, or a tensor of it does not fit, which the
            message names together with the key to set.
    """
    folder = Path(start.checkpoint)
    store.verify(folder)
    theirs = _shapes_in(folder)
    ours = _shapes_of(engine)
    new = fitting(ours, theirs, RunConfig.load(start.run.config), cfg, folder)
    wanted = {
        name: entry
        for name, entry in sharded_tensors(engine.model).items()
        if entry.key in theirs  # a factory bears the key of the tensors that it makes
    }
    loaded = store.load(folder, {"model": wanted})["model"]
    engine.load({**engine.model.state_dict(), **loaded}, None)
    return new


def fitting(ours: Shapes, theirs: Shapes, source: RunConfig, cfg: RunConfig, folder: Path) -> list[str]:
    """Names of our tensors that the checkpoint lacks, all of which are parts that REFRACTOR adds.

    Args:
        ours, theirs: global shapes by name, of the whole model and of the checkpoint.
        source, cfg: configurations that made them, which say which key is at fault.
    """
    new = [name for name in ours if name not in theirs]
    for name, shape in ours.items():
        if name in theirs and theirs[name] != shape:
            raise _misfit(f"{name} is {list(theirs[name])} there and {list(shape)} here", name, source, cfg, folder)
        if name not in theirs and not name.endswith(tuple(ADDED)):
            raise _misfit(f"{name} is missing there", name, source, cfg, folder)
    for name in theirs:
        if name not in ours:
            raise _misfit(f"{name} is there and has no place here", name, source, cfg, folder)
    if _heads(source) != _heads(cfg):  # as many key/value heads as heads: no shape tells
        name = next(name for name in ours if name.endswith("linear_qkv.weight"))
        raise _misfit(f"the heads of {name} are others", name, source, cfg, folder)
    return sorted(new)


def _heads(cfg: RunConfig) -> tuple[Any, Any]:
    values = cfg.values()
    return values["model.n_heads"], values["model.n_kv_heads"]


def _misfit(what: str, name: str, source: RunConfig, cfg: RunConfig, folder: Path) -> CheckpointError:
    keys = next((keys for end, keys in ADDED.items() if name.endswith(end)), None)
    if keys is None:
        keys = next((keys for part, keys in _SHAPED_BY.items() if part in name), ())
    before, now = source.values(), cfg.values()
    differing = [key for key in dict.fromkeys((*keys, *_SHAPES_ALL)) if before[key] != now[key]]
    set_ = ", ".join(f"{key}={as_text(before[key])} (now {as_text(now[key])})" for key in differing)
    way_out = f"set {set_}" if set_ else f"see {', '.join(keys) or 'model'} of both configurations"
    return CheckpointError(f"the weights in {folder} do not fit: {what}; {way_out}.")


def _shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global shapes of the weights in a checkpoint, by name: neither EMA nor optimizer state."""
    found = dist_checkpointing.load_tensors_metadata(str(folder))
    return {key: tuple(one.global_shape) for key, one in found.items() if key.startswith(_MODEL)}


def _shapes_of(engine: MegatronEngine) -> dict[str, tuple[int, ...]]:
    """Global shapes of the model's weights, by name, over all pipeline stages; the same on every rank."""
    own = {shard.key: shard.global_shape for shard in shards(engine.model)}
    every: list[dict[str, tuple[int, ...]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return {name: shape for part in every for name, shape in part.items()}
