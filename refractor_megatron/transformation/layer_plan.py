"""The one description of every layer. Assemblers (Megatron GPT now, others later) read it and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config.schema import RunConfig

#: Megatron's vocabulary padding; fixed so that every grid sees the same global shapes.
VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class AttentionPlan:
    """Tri-tier attention of one layer (spec section 4)."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None  # tier A: keys a query sees behind it, itself included; None = the whole prefix
    block_size: int  # tier B: tokens per summarised block
    summaries_per_block: int  # tier B: 0 turns the tier off
    backend: str
    rotary_theta: float
    rotary_alpha: float  # position scale in (0, 1]
    rotary_dim: int  # rotated width of one head


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
        """Weights that one token meets in matrix products (for FLOPs): no embedding look-up, k experts of E."""
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
    model, local, summaries = cfg.model, cfg.relation.local, cfg.relation.global_
    assert local.pattern == "sliding" and summaries.type == "attn_pool" and model.norm.type == "rmsnorm"
    head_dim = model.d_model // model.n_heads
    window = local.window if local.window < cfg.train.seq_len else None
    attention = AttentionPlan(
        heads=model.n_heads,
        kv_heads=model.n_kv_heads,
        head_dim=head_dim,
        window=window,
        block_size=summaries.block_size,
        # with the whole prefix in the window no block is ever outside it, so a summary could never be read
        summaries_per_block=summaries.summaries_per_block if window is not None else 0,
        backend=cfg.relation.backend,
        rotary_theta=model.rope.theta,
        rotary_alpha=model.rope.alpha,
        rotary_dim=min(head_dim, model.rope.dim // model.n_heads),
    )
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
        attention=(attention,) * model.n_layers,
        feed_forward=(feed_forward,) * model.n_layers,
    )
