"""Every configuration key below the root: type, default, meaning, bounds, origin. The single source of truth.

The defaults are the ``reference`` preset, that is the values of section 12.1 of the specification. YAML files under
``hydra_conf`` hold differences from these defaults and nothing else. Keys of section 12.1 bear their own names; where
a name is a Python keyword the attribute carries a trailing underscore (``relation.global_``, ``regret.lambda_``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .data import Data as Data
from .relation import Relation as Relation
from .tree import Bounds, Section, branch, leaf

_POSITIVE = Bounds(gt=0)
_NOT_NEGATIVE = Bounds(ge=0)
_AT_LEAST_ONE = Bounds(ge=1)
_BELOW_ONE = Bounds(ge=0, lt=1)
#: Makes the exported model's configuration, which the decoder reads.
_EXPORT = "hf.from_run"

#: Rules of the five mask classes that ship with the reference preset. Plain documents (role ``data``, no scope bits)
#: meet neither of them.
DEFAULT_MASKS: tuple[dict[str, Any], ...] = (
    {
        "name": "tool_scope",
        "when": {"role": "tool"},
        "allow_read_from": ["system", "user", "assistant", "tool"],
        "allow_write_to": ["assistant", "tool"],
        "causal": True,
    },
    # Nobody outside the scope may read a restricted token; inside it, tokens read each other.
    {"name": "safety_restricted", "when": {"bits": ["SAFETY_SCOPE"]}, "allow_write_to": [], "causal": True},
)


@dataclass(frozen=True, eq=False, repr=False)
class Ffn(Section):
    """Feed-forward part of a block."""

    type: Literal["moe", "dense"] = leaf(
        "moe", "Feed-forward kind: mixture of experts or dense", reader="transformation.layer_plan"
    )
    experts: int = leaf(
        64, "Experts per layer", bounds=_AT_LEAST_ONE, limit=(16, 128), reader="transformation.layer_plan"
    )
    topk: int = leaf(
        2, "Experts that process each token", bounds=_AT_LEAST_ONE, limit=(1, 4), reader="transformation.layer_plan"
    )
    hidden: int = leaf(
        12288, "Hidden width of the feed-forward, of each expert if there are experts", unit="features",
        bounds=_AT_LEAST_ONE, reader="transformation.layer_plan",
    )  # fmt: skip
    activation: Literal["swiglu", "gelu"] = leaf(
        "swiglu",
        "Activation: gated SwiGLU (three matrices) or GELU (two)",
        section="5.1",
        reader="transformation.layer_plan",
    )


@dataclass(frozen=True, eq=False, repr=False)
class Norm(Section):
    """Normalisation before attention, before the feed-forward and at the end."""

    type: Literal["rmsnorm"] = leaf("rmsnorm", "Normalisation kind", reader="transformation.layer_plan")
    eps: float = leaf(
        1e-6, "Added to the mean square before the root", bounds=_POSITIVE, reader="transformation.layer_plan"
    )


@dataclass(frozen=True, eq=False, repr=False)
class Rope(Section):
    """Rotary positions."""

    theta: float = leaf(1e6, "Base of the rotary frequencies", bounds=Bounds(gt=1), reader="transformation.layer_plan")
    alpha: float = leaf(
        0.75,
        "Position scaling for context extension; 1 is plain rotary",
        bounds=Bounds(gt=0, le=1),
        reader="transformation.layer_plan",
    )
    dim: int = leaf(
        4096, "Rotary width summed over all heads; equal to d_model every feature rotates", unit="features",
        bounds=Bounds(ge=2), reader="transformation.layer_plan",
    )  # fmt: skip
    scaling: Literal["linear", "yarn"] = leaf(
        "linear", "How alpha extends the context: positions times alpha, or YaRN with factor 1/alpha from context_max "
        "times alpha", section="own", reader="transformation.layer_plan",
    )  # fmt: skip
    beta_fast: float = leaf(
        32.0, "YaRN: features that turn more often than this within the original length keep their frequency",
        unit="turns", section="own", bounds=_POSITIVE, reader="transformation.layer_plan",
    )  # fmt: skip
    beta_slow: float = leaf(
        1.0, "YaRN: features that turn less often than this are interpolated", unit="turns", section="own",
        bounds=_POSITIVE, reader="transformation.layer_plan",
    )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Model(Section):
    """Shape of the decoder."""

    name: str = leaf(
        "reference",
        "Name of the shape, a label in the resolved configuration",
        section="own",
        resume="free",
        reader="config",
    )
    d_model: int = leaf(
        4096, "Width of the residual stream", unit="features", bounds=_AT_LEAST_ONE, limit=(1024, 8192),
        reader="transformation.layer_plan",
    )  # fmt: skip
    n_layers: int = leaf(
        48,
        "Blocks of the decoder, each attention and feed-forward",
        bounds=_AT_LEAST_ONE,
        limit=(24, 80),
        reader="transformation.layer_plan",
    )
    n_heads: int = leaf(32, "Query heads", bounds=_AT_LEAST_ONE, limit=(16, 64), reader="transformation.layer_plan")
    n_kv_heads: int = leaf(
        8, "Key/value heads, each shared by n_heads/n_kv_heads query heads", bounds=_AT_LEAST_ONE, limit=(4, 16),
        reader="transformation.layer_plan",
    )  # fmt: skip
    vocab_size: int = leaf(
        32768, "Size of the tokenizer's vocabulary, special tokens included", unit="tokens", section="own",
        bounds=Bounds(ge=512), reader="transformation.layer_plan, training.data_options",
    )  # fmt: skip
    context_max: int = leaf(
        65536, "Longest sequence the model is made for", unit="tokens", section="16", bounds=_AT_LEAST_ONE,
        limit=(32768, 262144), reader="config",
    )  # fmt: skip
    tie_embeddings: bool = leaf(
        False, "Share the matrix of input embedding and output head", section="own", reader="transformation.layer_plan"
    )
    role_embeddings: bool = leaf(
        True,
        "Add a learned embedding of the token's role to its embedding",
        section="3",
        reader="transformation.layer_plan",
    )
    init_std: float = leaf(
        0.02,
        "Standard deviation of the initial weights",
        section="own",
        bounds=_POSITIVE,
        reader="transformation.layer_plan",
    )
    ffn: Ffn = branch(Ffn)
    norm: Norm = branch(Norm)
    rope: Rope = branch(Rope)


@dataclass(frozen=True, eq=False, repr=False)
class KvCache(Section):
    """Key/value cache of generation."""

    chunk: int = leaf(512, "Tokens in a chunk of the cache", unit="tokens", bounds=_AT_LEAST_ONE, reader=_EXPORT)
    compress_ratio: float = leaf(
        0.5, "Size of an old chunk relative to fp16", bounds=Bounds(gt=0, le=1), reader=_EXPORT
    )


@dataclass(frozen=True, eq=False, repr=False)
class Episodic(Section):
    """Vector store of past records."""

    embed_dim: int = leaf(1536, "Width of a key", unit="features", bounds=_AT_LEAST_ONE, reserved=True)
    index: Literal["hnsw", "ivf_flat"] = leaf("hnsw", "Kind of nearest-neighbour index", reserved=True)
    M: int = leaf(32, "Neighbours per node of the HNSW graph", bounds=_AT_LEAST_ONE, reserved=True)
    efSearch: int = leaf(64, "Candidates kept while searching the HNSW graph", bounds=_AT_LEAST_ONE, reserved=True)


@dataclass(frozen=True, eq=False, repr=False)
class Memory(Section):
    """Memories beside the weights."""

    kv: KvCache = branch(KvCache)
    episodic: Episodic = branch(Episodic)


@dataclass(frozen=True, eq=False, repr=False)
class LoadBalance(Section):
    """Losses that keep the experts in use."""

    lambda_ent: float = leaf(
        0.01, "Coefficient of the gate-entropy loss", bounds=_NOT_NEGATIVE, reader="engines.megatron"
    )
    lambda_kl: float = leaf(
        0.05, "Coefficient of the load-balance loss", bounds=_NOT_NEGATIVE, reader="engines.megatron"
    )
    entropy: Literal["band", "minimize"] = leaf(
        "band", "Hold the normalised gate entropy within 0.4-0.8, or minimise it as section 8.1 is worded", section="8",
        reader="engines.megatron",
    )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Regret(Section):
    """Bandit regret of the router."""

    lambda_: float = leaf(0.02, "Coefficient of the regret loss", bounds=_NOT_NEGATIVE, reserved=True)
    horizon: int = leaf(1024, "Half-life of the reward sums", unit="tokens", bounds=_AT_LEAST_ONE, reserved=True)


@dataclass(frozen=True, eq=False, repr=False)
class Router(Section):
    """Choice of experts."""

    gate_temp: float = leaf(1.0, "Temperature of the gate's softmax", bounds=_POSITIVE, reader="engines.megatron")
    renormalize_topk: bool = leaf(
        True, "Rescale the chosen experts' probabilities to sum to one", section="own", reader="engines.megatron"
    )
    gate_features: bool = leaf(
        False, "Add learned weights of the token's role and scope bits to the gate's logits", section="3",
        reader="engines.megatron",
    )  # fmt: skip
    lb: LoadBalance = branch(LoadBalance)
    regret: Regret = branch(Regret)


@dataclass(frozen=True, eq=False, repr=False)
class ConstrainedDecoding(Section):
    """Limits on sampled tokens inside protected scopes."""

    enabled: bool = leaf(True, "Keep sampling away from forbidden tokens inside a safety scope", reserved=True)
    max_bad_tokens: int = leaf(
        0, "Forbidden tokens tolerated per request", unit="tokens", bounds=_NOT_NEGATIVE, reserved=True
    )


@dataclass(frozen=True, eq=False, repr=False)
class Safety(Section):
    """Information flow."""

    masks: tuple[dict[str, Any], ...] = leaf(
        DEFAULT_MASKS,
        "Rules who may read whom: name, when, allow_read_from, allow_write_to, causal",
        reader="engines.megatron",
    )
    constrained_decoding: ConstrainedDecoding = branch(ConstrainedDecoding)


@dataclass(frozen=True, eq=False, repr=False)
class Optimizer(Section):
    """Update rule."""

    type: Literal["adamw"] = leaf("adamw", "Update rule of the weights", reader="engines.megatron")
    lr: float = leaf(2e-4, "Peak learning rate", bounds=_POSITIVE, reader="engines.megatron")
    beta1: float = leaf(0.9, "Decay of the mean of the gradient", bounds=_BELOW_ONE, reader="engines.megatron")
    beta2: float = leaf(0.95, "Decay of the mean of its square", bounds=_BELOW_ONE, reader="engines.megatron")
    eps: float = leaf(
        1e-8, "Added to the root of the second moment", section="own", bounds=_POSITIVE, reader="engines.megatron"
    )
    wd: float = leaf(0.1, "Decoupled weight decay of matrices", bounds=_NOT_NEGATIVE, reader="engines.megatron")


@dataclass(frozen=True, eq=False, repr=False)
class Cosine(Section):
    """Decay after the warm-up."""

    min_lr: float = leaf(
        1e-5, "Learning rate at the end of the cosine", bounds=_NOT_NEGATIVE, reader="training.schedule"
    )
    steps: int | None = leaf(
        None, "Step at which the cosine ends; null means train.steps", unit="steps", section="own",
        bounds=_AT_LEAST_ONE, reader="training.schedule",
    )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Tail(Section):
    """Learning rate after the cosine."""

    type: Literal["constant", "rm"] = leaf(
        "constant",
        "Stay at min_lr, or decay as a power of the step (Robbins-Monro)",
        section="9",
        reader="training.schedule",
    )
    power: float = leaf(
        0.75, "Exponent of the Robbins-Monro tail", section="9", bounds=Bounds(gt=0.5, le=1), reader="training.schedule"
    )


@dataclass(frozen=True, eq=False, repr=False)
class Schedule(Section):
    """Learning rate by step."""

    warmup_steps: int = leaf(
        8000, "Steps of linear warm-up", unit="steps", bounds=_NOT_NEGATIVE, reader="training.schedule"
    )
    cosine: Cosine = branch(Cosine)
    tail: Tail = branch(Tail)


@dataclass(frozen=True, eq=False, repr=False)
class Ema(Section):
    """Running average of the weights."""

    enabled: bool = leaf(
        True, "Keep an exponential moving average of the weights", section="5", reader="training.state"
    )
    decay: float = leaf(0.999, "Decay of the average per step", section="5", bounds=_BELOW_ONE, reader="training.state")


@dataclass(frozen=True, eq=False, repr=False)
class Train(Section):
    """The training run."""

    steps: int = leaf(
        20000, "Optimizer steps of the run", unit="steps", section="own", bounds=_AT_LEAST_ONE, resume="free",
        reader="training.worker",
    )  # fmt: skip
    global_batch: int = leaf(
        64, "Sequences per optimizer step over all ranks", unit="sequences", section="own", bounds=_AT_LEAST_ONE,
        reader="training.worker",
    )  # fmt: skip
    micro_batch: int = leaf(
        1, "Sequences per forward pass of one rank", unit="sequences", section="own", bounds=_AT_LEAST_ONE,
        reader="training.worker",
    )  # fmt: skip
    seq_len: int = leaf(
        4096, "Tokens of a sequence", unit="tokens", section="own", bounds=_AT_LEAST_ONE, reader="training.dataset"
    )
    seed: int = leaf(
        1234, "Seed of initial weights and of the order of samples", section="own", bounds=Bounds(ge=0, lt=2**31),
        reader="engines.megatron",
    )  # fmt: skip
    mixed_precision: Literal["bf16", "fp32"] = leaf(
        "bf16", "Arithmetic: bf16 with fp32 master weights, or fp32 throughout", reader="engines.megatron"
    )
    grad_clip: float = leaf(
        1.0, "Largest global gradient norm; 0 turns clipping off", bounds=_NOT_NEGATIVE, reader="engines.megatron"
    )
    recompute: Literal["none", "full"] = leaf(
        "none", "Recompute activations in the backward pass", section="own", reader="engines.megatron"
    )
    optimizer: Optimizer = branch(Optimizer)
    schedule: Schedule = branch(Schedule)
    ema: Ema = branch(Ema)


@dataclass(frozen=True, eq=False, repr=False)
class Parallel(Section):
    """Grid of ranks; data parallelism is ranks/(tp*cp*pp), sequence parallelism follows tp > 1."""

    tp: int = leaf(
        1,
        "Ranks that share each matrix (tensor parallel)",
        unit="ranks",
        section="15",
        bounds=_AT_LEAST_ONE,
        resume="free",
        reader="engines.megatron",
    )
    pp: int = leaf(
        1,
        "Ranks that share the layers (pipeline parallel)",
        unit="ranks",
        section="15",
        bounds=_AT_LEAST_ONE,
        resume="free",
        reader="engines.megatron",
    )
    cp: int = leaf(
        1,
        "Ranks that share each sequence (context parallel)",
        unit="ranks",
        section="own",
        bounds=_AT_LEAST_ONE,
        resume="free",
        reader="engines.megatron",
    )
    ep: int = leaf(
        1,
        "Ranks that share the experts (expert parallel)",
        unit="ranks",
        section="15",
        bounds=_AT_LEAST_ONE,
        resume="free",
        reader="engines.megatron",
    )


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint(Section):
    """Saved states."""

    every: int = leaf(
        100,
        "Steps between checkpoints",
        unit="steps",
        section="own",
        bounds=_AT_LEAST_ONE,
        resume="free",
        reader="training.worker",
    )
    keep: int = leaf(
        2,
        "Newest checkpoints that stay on disk",
        section="own",
        bounds=_AT_LEAST_ONE,
        resume="free",
        reader="training.worker",
    )


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Section):
    """Held-out evaluation during training."""

    every: int = leaf(
        100,
        "Steps between evaluations",
        unit="steps",
        section="own",
        bounds=_AT_LEAST_ONE,
        resume="free",
        reader="training.worker",
    )
    batches: int = leaf(
        8,
        "Held-out micro-batches per evaluation",
        section="own",
        bounds=_AT_LEAST_ONE,
        resume="free",
        reader="training.worker",
    )
    samples: int = leaf(
        3,
        "Continuations sampled at the end",
        section="own",
        bounds=_NOT_NEGATIVE,
        resume="free",
        reader="evaluation.final",
    )
    sample_tokens: int = leaf(
        64,
        "Tokens of each continuation",
        unit="tokens",
        section="own",
        bounds=_AT_LEAST_ONE,
        resume="free",
        reader="evaluation.final",
    )


@dataclass(frozen=True, eq=False, repr=False)
class Telemetry(Section):
    """Where metrics go besides the console and metrics.jsonl."""

    tensorboard: bool = leaf(
        True, "Write TensorBoard event files", section="11", resume="free", reader="training.worker"
    )
    wandb: bool = leaf(
        True, "Write an offline Weights & Biases run", section="11", resume="free", reader="training.worker"
    )
    every: int = leaf(
        1,
        "Steps between two lines of metrics",
        unit="steps",
        section="11",
        bounds=_AT_LEAST_ONE,
        resume="free",
        reader="training.worker",
    )
    attention_rows: int = leaf(
        64,
        "Queries of each sample whose attention is measured at an evaluation; 0 measures none",
        section="11",
        bounds=_NOT_NEGATIVE,
        resume="free",
        reader="training.worker",
    )
