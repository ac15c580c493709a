"""The one table between Megatron's tensors and those of the HF model, read in both directions.

A Megatron key names the global tensor of any grid. Experts lie behind each other in one tensor, [E, out, in]; the table
has an entry for each of them, so that a converter holds one expert at a time. Megatron pads vocabularies: the rows that
no token has are kept under names of their own (``padding=True``) in a file that the HF model never loads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import CheckpointError
from .rules import GroupedQkv, Rows, Rule, Same
from .shape import LayerShape, Shape, padded


@dataclass(frozen=True)
class HfTensor:
    """A tensor of the HF side; ``padding`` ones go to the side file and are no part of the model."""

    name: str
    shape: tuple[int, ...]
    padding: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor, or one expert's slice of it, and the HF tensors that hold the same numbers.

    ``shape`` is that of the slice: without the expert axis where ``expert`` is a number.
    """

    key: str
    expert: int | None
    shape: tuple[int, ...]
    tensors: tuple[HfTensor, ...]
    rule: Rule

    @property
    def name(self) -> str:
        """Name of the slice for messages."""
        return self.key if self.expert is None else f"{self.key}[{self.expert}]"


Table = tuple[Entry, ...]


def table(shape: Shape) -> Table:
    """Every weight of a model, in the order in which an HF folder lists them."""
    entries = [*_embeddings(shape)]
    for number, layer in enumerate(shape.layers):
        entries += _layer(shape, number, layer)
    entries += [_same("decoder.final_layernorm.weight", "model.norm.weight", shape.hidden)]
    if not shape.tied:
        entries += [_vocabulary(shape, "output_layer.weight", "lm_head")]
    return tuple(entries)


def global_shapes(entries: Table) -> dict[str, tuple[int, ...]]:
    """Shape of every whole Megatron tensor by key."""
    found: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        found[entry.key] = entry.shape if entry.expert is None else (entry.expert + 1, *entry.shape)
    return found


def to_hf(entries: Table, megatron: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """HF tensors, padding included, of whole Megatron tensors: weights, gradients, anything of their shapes.

    Raises:
        CheckpointError: a tensor is missing, or has another shape.
    """
    found: dict[str, Tensor] = {}
    shapes = global_shapes(entries)
    for entry in entries:
        whole = _take(megatron, entry.key, shapes[entry.key])
        piece = whole if entry.expert is None else whole[entry.expert]
        for target, tensor in zip(entry.tensors, entry.rule.split(piece), strict=True):
            found[target.name] = tensor
    return found


def to_megatron(entries: Table, hf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole Megatron tensors of HF ones; missing padding rows are zeros.

    Raises:
        CheckpointError: a tensor is missing, or has another shape.
    """
    pieces: dict[str, list[Tensor]] = {}
    for entry in entries:
        like = _take(hf, entry.tensors[0].name, entry.tensors[0].shape)
        parts = [
            like.new_zeros(target.shape)
            if target.padding and target.name not in hf
            else _take(hf, target.name, target.shape)
            for target in entry.tensors
        ]
        joined = entry.rule.join(parts)
        pieces.setdefault(entry.key, []).append(joined)
    shapes = global_shapes(entries)
    return {k: torch.stack(p).reshape(shapes[k]) if len(p) > 1 else p[0].reshape(shapes[k]) for k, p in pieces.items()}


def _take(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"tensor {name} is missing: the model of this configuration needs it.")
    if tuple(tensors[name].shape) != shape:
        raise CheckpointError(
            f"tensor {name} has shape {list(tensors[name].shape)} and the configuration asks for {list(shape)}: "
            "give the configuration that belongs to these weights."
        )
    return tensors[name]


def _same(key: str, name: str, *shape: int) -> Entry:
    return Entry(key, None, shape, (HfTensor(name, shape),), Same())


def _embeddings(shape: Shape) -> Iterator[Entry]:
    yield _vocabulary(shape, "embedding.word_embeddings.weight", "model.embed_tokens")
    if shape.roles:
        key, name = "embedding.tokentype_embeddings.weight", "model.role_embeddings.weight"
        yield _same(key, name, shape.roles, shape.hidden)


def _vocabulary(shape: Shape, key: str, module: str) -> Entry:
    """A matrix with a row for each token, and rows behind them that fill it up to Megatron's multiple."""
    rows, extra = shape.vocab, padded(shape.vocab) - shape.vocab
    if not extra:
        return _same(key, f"{module}.weight", rows, shape.hidden)
    true = HfTensor(f"{module}.weight", (rows, shape.hidden))
    fill = HfTensor(f"{module}.padding", (extra, shape.hidden), padding=True)
    return Entry(key, None, (rows + extra, shape.hidden), (true, fill), Rows((rows, extra)))


def _layer(shape: Shape, number: int, layer: LayerShape) -> Iterator[Entry]:
    ours, theirs = f"decoder.layers.{number}", f"model.layers.{number}"
    # Megatron's checkpoints fuse a norm's name with the linear layer behind it, experts or not
    norm = f"{ours}.self_attention.linear_qkv.layer_norm_weight"
    yield _same(norm, f"{theirs}.input_layernorm.weight", shape.hidden)
    yield _qkv(shape, f"{ours}.self_attention.linear_qkv.weight", f"{theirs}.self_attn")
    output = shape.hidden, shape.heads * shape.head_dim
    yield _same(f"{ours}.self_attention.linear_proj.weight", f"{theirs}.self_attn.o_proj.weight", *output)
    yield from _tiers(shape, layer, f"{ours}.self_attention.core_attention", f"{theirs}.self_attn")
    norm = f"{ours}.mlp.linear_fc1.layer_norm_weight"
    yield _same(norm, f"{theirs}.post_attention_layernorm.weight", shape.hidden)
    if not shape.experts:
        yield from _feed_forward(shape, f"{ours}.mlp", f"{theirs}.mlp", None)
        return
    yield _same(f"{ours}.mlp.router.weight", f"{theirs}.mlp.gate.weight", shape.experts, shape.hidden)
    if shape.router_features:
        features = f"{ours}.mlp.router.feature_weight", f"{theirs}.mlp.gate.feature_weight"
        yield _same(*features, shape.experts, shape.features)
    for expert in range(shape.experts):
        yield from _feed_forward(shape, f"{ours}.mlp.experts.experts", f"{theirs}.mlp.experts.{expert}", expert)


def _qkv(shape: Shape, key: str, module: str) -> Entry:
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = tuple(
        HfTensor(f"{module}.{letter}_proj.weight", (rows, shape.hidden))
        for letter, rows in (("q", q), ("k", kv), ("v", kv))
    )
    rule = GroupedQkv(shape.heads, shape.kv_heads, shape.head_dim)
    return Entry(key, None, (q + 2 * kv, shape.hidden), tensors, rule)


def _tiers(shape: Shape, layer: LayerShape, ours: str, theirs: str) -> Iterator[Entry]:
    """Weights of summaries, retrieved records and tier gates: the same names, the same shapes."""
    pooling = shape.kv_heads, layer.queries, shape.head_dim
    for name in ("summary_query", "group_query")[: layer.levels]:
        yield _same(f"{ours}.{name}", f"{theirs}.{name}", *pooling)
    if layer.record_dim:
        for name in ("retrieved_key", "retrieved_value"):
            projection = shape.kv_heads * shape.head_dim, layer.record_dim
            yield _same(f"{ours}.{name}", f"{theirs}.{name}.weight", *projection)
    if layer.tiers:
        yield _same(f"{ours}.tier_gate_bias", f"{theirs}.tier_gate_bias", shape.heads, layer.tiers)
        gate = shape.heads, layer.tiers, shape.features
        yield _same(f"{ours}.tier_gate_weight", f"{theirs}.tier_gate_weight", *gate)


def _feed_forward(shape: Shape, ours: str, theirs: str, expert: int | None) -> Iterator[Entry]:
    wide, narrow = (shape.ffn, shape.hidden), (shape.hidden, shape.ffn)
    names = ("gate_proj", "up_proj") if shape.gated else ("up_proj",)
    halves = tuple(HfTensor(f"{theirs}.{name}.weight", wide) for name in names)
    rule: Rule = Rows((shape.ffn, shape.ffn)) if shape.gated else Same()
    yield Entry(f"{ours}.linear_fc1.weight", expert, (len(names) * shape.ffn, shape.hidden), halves, rule)
    down = HfTensor(f"{theirs}.down_proj.weight", narrow)
    yield Entry(f"{ours}.linear_fc2.weight", expert, narrow, (down,), Same())
