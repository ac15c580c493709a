"""The numbers that decide which weights a model has, taken from a run's configuration or from an HF one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...config.schema import RunConfig
from ...distinction.gating import GATE_FEATURES
from ...distinction.roles import ROLES
from ...transformation.layer_plan import VOCAB_MULTIPLE, plan_layers


def padded(vocab_size: int) -> int:
    """Rows of Megatron's vocabulary matrices for a vocabulary of this size."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True)
class LayerShape:
    """Weights of one layer's attention beside its four projections. Zero where the layer has none of them.

    ``queries``: pooling queries per key/value head and level; ``levels``: how many levels have them; ``record_dim``:
    width of a retrieved record's vector; ``tiers``: tiers with a learned gate.
    """

    queries: int = 0
    levels: int = 0
    record_dim: int = 0
    tiers: int = 0


@dataclass(frozen=True)
class Shape:
    """Everything that the names and shapes of all weights follow from.

    ``vocab`` is the true size; Megatron's matrices have ``padded(vocab)`` rows. ``ffn`` is the width of the
    feed-forward, of each expert where there are ``experts`` (0: dense). ``gated``: SwiGLU. ``roles``: rows of the role
    table, 0 without one. ``features``: gating features, read by routers if ``router_features`` and by tier gates.
    """

    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated: bool
    experts: int
    tied: bool
    roles: int
    router_features: bool
    layers: tuple[LayerShape, ...]
    features: int = len(GATE_FEATURES)

    @classmethod
    def of_run(cls, cfg: RunConfig) -> Shape:
        """Shape of the model that ``cfg`` trains."""
        plan = plan_layers(cfg)
        ffn, attention = plan.feed_forward[0], plan.attention[0]
        layers = []
        for one in plan.attention:
            summary, pools = one.mask.summary, one.pooling == "attn_pool"
            queries = summary.per_block if summary is not None and pools else 0
            levels = summary.levels if summary is not None and queries else 0
            gated = one.combine == "gated"
            layers.append(LayerShape(queries, levels, one.record_dim, len(one.mask.present) if gated else 0))
        return cls(
            vocab=cfg.model.vocab_size,
            hidden=plan.d_model,
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            ffn=ffn.hidden,
            gated=ffn.activation == "swiglu",
            experts=ffn.experts,
            tied=plan.tie_embeddings,
            roles=len(ROLES) if plan.role_embeddings else 0,
            router_features=bool(ffn.experts) and cfg.router.gate_features,
            layers=tuple(layers),
        )

    @classmethod
    def of_hf(cls, config: Any) -> Shape:
        """Shape of the model that a ``RefractorConfig`` describes (any object with its attributes will do)."""
        layers = tuple(_hf_layer(config, number) for number in range(1, config.num_hidden_layers + 1))
        return cls(
            vocab=config.vocab_size,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            ffn=config.intermediate_size,
            gated=config.hidden_act == "silu",
            experts=config.num_experts,
            tied=config.tie_word_embeddings,
            roles=len(config.roles) if config.role_embeddings else 0,
            router_features=bool(config.num_experts) and config.router_gate_features,
            layers=layers,
        )


def _hf_layer(config: Any, number: int) -> LayerShape:
    """Layer ``number``, counted from 1. Linear attention has neither summaries nor records nor gates."""
    if config.linear_attention is not None:
        return LayerShape()
    summaries, retrieval = config.summaries, config.retrieval
    reads = retrieval is not None and number in _sequence(retrieval["layers"])
    pools = summaries is not None and summaries["pooling"] == "attn_pool"
    tiers = 1 + (summaries is not None) + reads
    return LayerShape(
        queries=summaries["per_block"] if pools else 0,
        levels=summaries["levels"] if pools else 0,
        record_dim=retrieval["dim"] if reads else 0,
        tiers=tiers if config.combine == "gated" else 0,
    )


def _sequence(value: Any) -> Sequence[int]:
    assert isinstance(value, Sequence), value
    return value
