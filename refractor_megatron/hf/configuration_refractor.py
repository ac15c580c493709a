"""Configuration of REFRACTOR decoders for transformers. Self-contained: it travels beside the weights."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

#: Scope bits of ``mask_bits``, in the order in which they number the scopes of a token type.
SCOPE_BITS = {"TOOL_SCOPE": 4, "SAFETY_SCOPE": 8, "RET_SCOPE": 16}


class RefractorConfig(PreTrainedConfig):
    """Shape, attention tiers and information-flow rules of a REFRACTOR decoder.

    Sizes are in features, lengths in tokens, and ``vocab_size`` counts the tokenizer's ids without padding. What has no
    counterpart in other decoders:

    Args:
        num_experts: 0 for a dense feed-forward. intermediate_size: hidden width of the feed-forward, or of each expert.
        norm_topk_prob: the weights of the chosen experts sum to one.
        router_temperature, router_gate_features: the gate's softmax; whether it sees the token's role and scope bits.
        rotary_dim: rotated features of a head. rope_parameters: types ``default``, ``linear`` and ``yarn``.
        role_embeddings: a learned row of each role is added to the token embedding.
        roles, shared_roles: names in id order; roles whose tokens every segment of their document may read.
        mask_rules: who may read whom, each {name, when, allow_read_from, allow_write_to, causal: true}.
        rules_hash: digest of the rules in the training run, for comparison only.
        local_attention: {kind, window, dilation, unit, stride} of the nearest keys; window null reads every key.
        summaries: null, or {block_size, per_block, levels, fanout, pooling} of the summaries of earlier blocks.
        retrieval: null, or {chunk, fan_in, dim, layers} of attention to retrieved records (layers counted from 1).
        combine: one softmax over all tiers (``joint``), or one for each, ``gated`` or added up (``sum``).
        linear_attention: null, or {kernel, features, seed}: linear attention takes the place of the three tiers.
        kv_cache: {chunk, compress_ratio} of keys and values kept behind the window, and their size relative to fp16.
        role_token_ids: ids of the tokens that open a message of each role; end_token_id closes it.
    """

    model_type = "refractor"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32768,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int = 4,
        head_dim: int | None = None,
        intermediate_size: int = 1024,
        hidden_act: str = "silu",
        num_experts: int = 0,
        num_experts_per_tok: int = 0,
        norm_topk_prob: bool = True,
        router_temperature: float = 1.0,
        router_gate_features: bool = False,
        rms_norm_eps: float = 1e-6,
        rope_parameters: dict[str, Any] | None = None,
        rotary_dim: int | None = None,
        max_position_embeddings: int = 8192,
        initializer_range: float = 0.02,
        role_embeddings: bool = True,
        roles: tuple[str, ...] | list[str] = ("system", "user", "assistant", "tool", "code", "data"),
        shared_roles: tuple[str, ...] | list[str] = ("system",),
        mask_rules: list[dict[str, Any]] | None = None,
        rules_hash: str | None = None,
        local_attention: dict[str, Any] | None = None,
        summaries: dict[str, Any] | None = None,
        retrieval: dict[str, Any] | None = None,
        combine: str = "joint",
        linear_attention: dict[str, Any] | None = None,
        kv_cache: dict[str, Any] | None = None,
        role_token_ids: dict[str, int] | None = None,
        end_token_id: int | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.router_temperature = router_temperature
        self.router_gate_features = router_gate_features
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = dict(rope_parameters or {"rope_type": "default", "rope_theta": 1e6})
        self.rotary_dim = rotary_dim or self.head_dim
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.role_embeddings = role_embeddings
        self.roles = list(roles)
        self.shared_roles = list(shared_roles)
        self.mask_rules = list(mask_rules or [])
        self.rules_hash = rules_hash
        nearest = {"kind": "sliding", "window": None, "dilation": 1, "unit": 128, "stride": 1}
        self.local_attention = nearest | (local_attention or {})
        self.summaries = summaries
        self.retrieval = retrieval
        self.combine = combine
        self.linear_attention = linear_attention
        self.kv_cache = {"chunk": 512, "compress_ratio": 0.5} | (kv_cache or {})
        self.role_token_ids = dict(role_token_ids or {})
        self.end_token_id = end_token_id
        self.use_cache = use_cache
        _check(self)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def tiers(self) -> tuple[str, ...]:
        """Attention tiers that have keys, in the order of the gates' columns."""
        far = ["summary"] if self.summaries else []
        return (*far, *(["retrieved"] if self.retrieval else []), "local")

    def layer_tiers(self, layer: int) -> tuple[str, ...]:
        """Tiers of layer ``layer``, counted from 0."""
        reads = self.retrieval is not None and layer + 1 in self.retrieval["layers"]
        return tuple(tier for tier in self.tiers if tier != "retrieved" or reads)

    @property
    def reach(self) -> int | None:
        """Distance of the farthest token key that a query reads; None where it reads all."""
        local = self.local_attention
        kind, window, unit = local["kind"], local["window"], local["unit"]
        if window is None:
            return None
        if kind in ("sliding", "block"):
            return int(window) - 1
        near = max(1, window // 2) if kind == "hybrid" else window
        units = max(1, (window - near if kind == "hybrid" else window) // unit)
        if kind == "dilated":
            return int((units - 1) * local["dilation"] * unit + unit - 1)
        return int(near + unit - 2 + units * local["dilation"] * unit)


#: Keys of each part, with the values that its words may have and the least that its numbers may be.
_PARTS: dict[str, dict[str, Any]] = {
    "local_attention": {
        "kind": ("sliding", "dilated", "block", "hybrid"),
        "window": 1,
        "dilation": 1,
        "unit": 1,
        "stride": 1,
    },
    "summaries": {
        "block_size": 1,
        "per_block": 1,
        "levels": 1,
        "fanout": 0,
        "pooling": ("attn_pool", "mean", "max"),
    },
    "retrieval": {"chunk": 1, "fan_in": 1, "dim": 1, "layers": None},
    "linear_attention": {"kernel": ("elu+1", "favor+"), "features": 0, "seed": 0},
    "kv_cache": {"chunk": 1, "compress_ratio": 0},
}


def _check(config: RefractorConfig) -> None:
    """Raises ``ValueError`` for values that no model could have."""
    choices = {
        "hidden_act": (config.hidden_act, ("silu", "gelu")),
        "combine": (config.combine, ("joint", "gated", "sum")),
        "rope_parameters.rope_type": (config.rope_parameters.get("rope_type"), ("default", "linear", "yarn")),
    }
    for name, (value, known) in choices.items():
        _among(name, value, known)
    for name, keys in _PARTS.items():
        _check_part(name, getattr(config, name), keys)
    if config.summaries and config.summaries["levels"] not in (1, 2):
        raise ValueError(f"config.summaries.levels is {config.summaries['levels']}; there are 1 or 2.")
    layers = range(1, config.num_hidden_layers + 1)
    if config.retrieval and not set(config.retrieval["layers"]) <= set(layers):
        raise ValueError(f"config.retrieval.layers {config.retrieval['layers']} of {config.num_hidden_layers} layers.")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"config.num_attention_heads {config.num_attention_heads} is no multiple of num_key_value_heads "
            f"{config.num_key_value_heads}."
        )
    if config.num_experts and not 1 <= config.num_experts_per_tok <= config.num_experts:
        raise ValueError(f"config.num_experts_per_tok {config.num_experts_per_tok} of {config.num_experts} experts.")
    for rule in config.mask_rules:
        if not rule.get("causal", True):
            raise ValueError(
                f"config.mask_rules: rule {rule.get('name')!r} has causal: false; decoding cannot do that."
            )


def _check_part(name: str, part: dict[str, Any] | None, keys: dict[str, Any]) -> None:
    """The part has these keys and no others; words are known and numbers not too small."""
    if part is None:
        return
    if set(part) != set(keys):
        odd = min(set(part) ^ set(keys))
        raise ValueError(f"config.{name} {'has an unknown key' if odd in part else 'lacks'} {odd!r}.")
    for key, allowed in keys.items():
        if isinstance(allowed, tuple):
            _among(f"{name}.{key}", part[key], allowed)
        elif allowed is not None and part[key] is not None and part[key] < allowed:
            raise ValueError(f"config.{name}.{key} is {part[key]}; at least {allowed} is possible.")
        elif part[key] is None and (name, key) != ("local_attention", "window"):
            raise ValueError(f"config.{name}.{key} is null.")


def _among(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"config.{name} is {value!r}; a REFRACTOR model knows {', '.join(known)}.")


__all__ = ["RefractorConfig"]
