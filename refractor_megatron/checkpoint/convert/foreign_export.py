"""Our models as configurations of other decoders: what of a REFRACTOR model Llama, Mistral or Mixtral can express."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointError
from .foreign_config import FAMILIES

#: Parameters that only REFRACTOR has, by the end of their HF names.
OWN_TENSORS = (
    "role_embeddings.weight",
    "summary_query",
    "group_query",
    "retrieved_key.weight",
    "retrieved_value.weight",
    "tier_gate_bias",
    "tier_gate_weight",
    "gate.feature_weight",
)
#: Those that add nothing while they are zero throughout.
ADDITIVE = ("role_embeddings.weight", "gate.feature_weight")

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}


@dataclass(frozen=True)
class Export:
    """A model of another family, and what of ours is left out of it."""

    body: dict[str, Any]  # its config.json
    left_out: tuple[str, ...]  # parts that the caller has agreed to lose, in words


def foreign_body(config: Any, family: str, dtype: str, *, drop_tiers: bool) -> Export:
    """``config.json`` of the dense-compatible part of a model.

    Args:
        config: a ``RefractorConfig``. dtype: of the weights, as transformers spells it (``float32``).
        drop_tiers: leave out what only REFRACTOR has; without it such a part is refused.

    Raises:
        CheckpointError: ``family`` cannot express the model, or not without dropping parts of it; names them.
    """
    if family not in FAMILIES:
        raise CheckpointError(f"--to {family}: the models that can be written are {', '.join(FAMILIES)}.")
    if impossible := _impossible(config, family):
        raise CheckpointError(f"this model cannot become a {family} one: {'; '.join(impossible)}.")
    own = _own_parts(config, family)
    if own and not drop_tiers:
        raise CheckpointError(
            f"a {family} model cannot express {'; '.join(own)}: give --drop-tiers to leave that out, which changes "
            "what the model computes."
        )
    return Export(_body(config, family, dtype), tuple(own))


def is_own(name: str) -> bool:
    """Whether an HF tensor of ours has no counterpart in other decoders."""
    return name.endswith(OWN_TENSORS)


def _impossible(config: Any, family: str) -> list[str]:
    """Differences in the part that both models have."""
    found = []
    experts = config.num_experts
    if bool(experts) != (family == "mixtral"):
        found.append(f"it has {experts} experts a layer" if experts else "it has no experts")
    if config.hidden_act != "silu":
        found.append(f"its feed-forward is {config.hidden_act}, not a gated silu")
    if config.rotary_dim != config.head_dim:
        found.append(f"{config.rotary_dim} of the {config.head_dim} features of a head rotate")
    if config.linear_attention is not None:
        found.append("linear attention takes the place of softmax")
    if experts and not config.norm_topk_prob:
        found.append("the weights of the chosen experts do not sum to one (router.renormalize_topk)")
    if experts and config.router_temperature != 1.0:
        found.append(f"its router has temperature {config.router_temperature}")
    return found


def _own_parts(config: Any, family: str) -> list[str]:
    """What only REFRACTOR has, in words. Tables that may be zero are judged by their numbers, not here."""
    local, found = config.local_attention, []
    if config.summaries:
        found.append("summaries of earlier blocks (relation.global)")
    if config.retrieval:
        found.append("retrieved records (relation.retrieval)")
    if config.combine != "joint":
        found.append(f"tiers combined by {config.combine} (relation.combine)")
    if config.mask_rules:
        found.append(f"mask rules {', '.join(str(rule.get('name')) for rule in config.mask_rules)} (safety.masks)")
    if local["window"] is not None and not _is_plain_window(local, family):
        shape = local["kind"] if local["stride"] == 1 else f"{local['kind']} with stride {local['stride']}"
        found.append(f"the {shape} window of {local['window']} tokens (relation.local)")
    return found


def _is_plain_window(local: dict[str, Any], family: str) -> bool:
    return family != "llama" and local["kind"] == "sliding" and local["stride"] == 1


def _body(config: Any, family: str, dtype: str) -> dict[str, Any]:
    body = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": _rope(config.rope_parameters),
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
    }
    if family == "llama":
        return body | {"attention_bias": False, "mlp_bias": False}
    local = config.local_attention
    body["sliding_window"] = local["window"] if _is_plain_window(local, family) else None
    if family == "mixtral":
        body |= {"num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
    return body


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The same positions; a factor that came through 1 / (1 / factor) regains its round value."""
    tidy = {name: value for name, value in rope.items() if value is not None}
    if "factor" in tidy:
        tidy["factor"] = float(f"{tidy['factor']:.12g}")
    return tidy
