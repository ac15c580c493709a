"""The one description of every layer. Assemblers (Megatron GPT now, others later) read it and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..config.schema import RunConfig
from ..distinction.pattern import FULL, LocalPattern
from ..fabric.linear import LinearMode
from ..fabric.spec import MaskSpec, RetrievedSpec, SummarySpec
from ..fabric.summaries import Pooling
from .rotary import inv_freq_and_scale

#: Megatron's vocabulary padding; fixed so that every grid sees the same global shapes.
VOCAB_MULTIPLE = 128

Combine = Literal["joint", "gated", "sum"]


@dataclass(frozen=True)
class RotaryPlan:
    """Rotary positions (spec section 3); all layers share them."""

    theta: float
    alpha: float  # in (0, 1]: trained length over extended length
    dim: int  # rotated width of one head
    scaling: Literal["linear", "yarn"]
    context_max: int  # extended length, tokens
    beta_fast: float
    beta_slow: float

    def frequencies(self) -> tuple[Tensor, float]:
        """Angles per position, float64 [dim / 2], and the factor on cosines and sines."""
        return inv_freq_and_scale(
            self.theta, self.alpha, self.dim, self.scaling, self.context_max, self.beta_fast, self.beta_slow
        )


@dataclass(frozen=True)
class AttentionPlan:
    """Tri-tier attention of one layer (spec section 4)."""

    heads: int
    kv_heads: int
    head_dim: int
    mask: MaskSpec
    pooling: Pooling
    record_dim: int  # width of a retrieved record's vector; 0 where the layer reads none
    combine: Combine
    linear: LinearMode | None  # in place of the three tiers, for sequences beyond ``L_switch``
    backend: str
    rotary: RotaryPlan


@dataclass(frozen=True)
class FeedForwardPlan:
    """Dense or mixture-of-experts feed-forward of one layer (spec sections 5 and 8)."""

    type: Literal["dense", "moe"]
    hidden: int
    activation: Literal["swiglu", "gelu"]
    experts: int
    topk: int


@dataclass(frozen=True)
class LayerPlan:
    """Everything an assembler needs: model-wide numbers and one (attention, feed-forward) pair for each layer."""

    d_model: int
    vocab_size: int  # padded to VOCAB_MULTIPLE
    norm_eps: float
    init_std: float
    tie_embeddings: bool
    role_embeddings: bool
    attention: tuple[AttentionPlan, ...]
    feed_forward: tuple[FeedForwardPlan, ...]

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.attention)

    @property
    def active_parameters(self) -> int:
        """Weights that one token meets in matrix products (for FLOPs): no embedding look-up, k experts of E.

        Projections of retrieved records are left out: a chunk shares them.
        """
        total = self.d_model * self.vocab_size
        for attention, ffn in zip(self.attention, self.feed_forward, strict=True):
            width = attention.heads * attention.head_dim
            kv_width = attention.kv_heads * attention.head_dim
            total += self.d_model * (2 * width + 2 * kv_width)
            matrices = 3 if ffn.activation == "swiglu" else 2
            copies = ffn.topk if ffn.type == "moe" else 1
            total += copies * matrices * self.d_model * ffn.hidden
            if ffn.type == "moe":
                total += self.d_model * ffn.experts
        return total


def plan_layers(cfg: RunConfig) -> LayerPlan:
    """Derive the LayerPlan from the configuration (a pure function)."""
    model = cfg.model
    assert model.norm.type == "rmsnorm"
    ffn = model.ffn
    moe = ffn.type == "moe"
    feed_forward = FeedForwardPlan(
        type="moe" if moe else "dense",
        hidden=ffn.hidden,
        activation=ffn.activation,
        experts=ffn.experts if moe else 0,
        topk=ffn.topk if moe else 0,
    )
    return LayerPlan(
        d_model=model.d_model,
        vocab_size=-(-model.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        norm_eps=model.norm.eps,
        init_std=model.init_std,
        tie_embeddings=model.tie_embeddings,
        role_embeddings=model.role_embeddings,
        attention=_attention_plans(cfg),
        feed_forward=(feed_forward,) * model.n_layers,
    )


def _attention_plans(cfg: RunConfig) -> tuple[AttentionPlan, ...]:
    """One plan for each layer. Keys that the other settings leave without effect are not read, hence refused."""
    model, rope, linear = cfg.model, cfg.model.rope, cfg.relation.linear_mode
    head_dim = model.d_model // model.n_heads
    yarn = rope.scaling == "yarn"
    rotary = RotaryPlan(
        rope.theta,
        rope.alpha,
        min(head_dim, rope.dim // model.n_heads),
        rope.scaling,
        model.context_max,
        rope.beta_fast if yarn else 0.0,
        rope.beta_slow if yarn else 0.0,
    )
    long = linear.enabled and cfg.train.seq_len > linear.L_switch
    masks = (MaskSpec(),) * model.n_layers if long else _masks(cfg)
    random = long and linear.kernel == "favor+"
    mode = LinearMode("favor+", linear.features, cfg.train.seed) if random else LinearMode()
    return tuple(
        AttentionPlan(
            heads=model.n_heads,
            kv_heads=model.n_kv_heads,
            head_dim=head_dim,
            mask=mask,
            pooling=cfg.relation.global_.type if mask.summary is not None else "attn_pool",
            record_dim=cfg.relation.retrieval.dim if mask.retrieved is not None else 0,
            combine="joint" if long else cfg.relation.combine,
            linear=mode if long else None,
            backend="auto" if long else cfg.relation.backend,
            rotary=rotary,
        )
        for mask in masks
    )


def _masks(cfg: RunConfig) -> tuple[MaskSpec, ...]:
    summaries, retrieval = cfg.relation.global_, cfg.relation.retrieval
    local = _local_pattern(cfg)
    summary = None
    # with the whole prefix in the window no block is ever outside it, so a summary could never be read
    if summaries.summaries_per_block and local != FULL:
        levels = summaries.levels
        fanout = summaries.fanout if levels == 2 else 0
        summary = SummarySpec(summaries.block_size, summaries.summaries_per_block, levels, fanout)
    retrieved = RetrievedSpec(retrieval.chunk, retrieval.fan_in) if retrieval.enabled and retrieval.fan_in else None
    layers = range(1, cfg.model.n_layers + 1)
    chosen = retrieval.layers if retrieved is not None else ()
    return tuple(MaskSpec(local, summary, retrieved if chosen is None or layer in chosen else None) for layer in layers)


def _local_pattern(cfg: RunConfig) -> LocalPattern:
    local = cfg.relation.local
    kind, window = local.pattern, local.window
    if kind in ("sliding", "block") and window >= cfg.train.seq_len:
        return FULL
    if kind == "sliding":
        return LocalPattern(kind, window, stride=local.stride)
    if kind == "block":
        return LocalPattern(kind, window)
    return LocalPattern(kind, window, local.dilation, local.dilation_unit)
