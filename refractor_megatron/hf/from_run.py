"""RunConfig <-> RefractorConfig: the same model described for training and for transformers."""

from __future__ import annotations

import re
from inspect import signature
from typing import Any

from ..config import RunConfig, compose
from ..config.schema import as_text
from ..distinction.closure import compile_checked
from ..distinction.roles import ROLES
from ..distinction.rules import SHARED_ROLES, Rule
from ..errors import ConfigError
from ..tokenizer import Tokenizer
from ..transformation.layer_plan import AttentionPlan, RotaryPlan, plan_layers
from .configuration_refractor import RefractorConfig


def hf_config(cfg: RunConfig, tokenizer: Tokenizer | None) -> RefractorConfig:
    """The transformers configuration of a run's model.

    Without a tokenizer the ids of role and end tokens stay unknown, and records have to be given to the model.

    Raises:
        ConfigError: the tokenizer has more ids than ``model.vocab_size``, or a rule is not causal.
    """
    plan, model = plan_layers(cfg), cfg.model
    rules = compile_checked(cfg.safety.masks)[0]
    if not rules.causal:
        names = " and ".join(map(repr, rules.noncausal_rules()))
        raise ConfigError(f"safety.masks rule {names} has causal: false; a decoder cannot serve that.")
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids and model.vocab_size is {model.vocab_size}: "
            "give the tokenizer of the run's dataset."
        )
    attention, ffn = plan.attention[0], plan.feed_forward[0]
    reading = [n for n, one in enumerate(plan.attention, start=1) if one.mask.retrieved is not None]
    return RefractorConfig(
        architectures=["RefractorForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_refractor.RefractorConfig",
            "AutoModel": "modeling_refractor.RefractorModel",
            "AutoModelForCausalLM": "modeling_refractor.RefractorForCausalLM",
        },
        vocab_size=model.vocab_size,
        hidden_size=plan.d_model,
        num_hidden_layers=plan.n_layers,
        num_attention_heads=attention.heads,
        num_key_value_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        intermediate_size=ffn.hidden,
        hidden_act="silu" if ffn.activation == "swiglu" else "gelu",
        num_experts=ffn.experts,
        num_experts_per_tok=ffn.topk,
        norm_topk_prob=cfg.router.renormalize_topk if ffn.experts else True,
        router_temperature=cfg.router.gate_temp if ffn.experts else 1.0,
        router_gate_features=cfg.router.gate_features if ffn.experts else False,
        rms_norm_eps=plan.norm_eps,
        rope_parameters=_rope(attention.rotary),
        rotary_dim=attention.rotary.dim,
        max_position_embeddings=model.context_max,
        initializer_range=plan.init_std,
        tie_word_embeddings=plan.tie_embeddings,
        role_embeddings=plan.role_embeddings,
        roles=list(ROLES),
        shared_roles=list(SHARED_ROLES),
        mask_rules=[_rule(rule) for rule in rules.rules],
        rules_hash=rules.digest,
        kv_cache={"chunk": cfg.memory.kv.chunk, "compress_ratio": cfg.memory.kv.compress_ratio},
        **_tiers(plan.attention[reading[0] - 1] if reading else attention, reading),
        **_special_ids(tokenizer),
    )


def _rule(rule: Rule) -> dict[str, Any]:
    """A rule as ``safety.masks`` has it: fields that restrict nothing are left out, because null would be refused."""
    written = {name: value for name, value in rule.canonical().items() if value is not None}
    return written | {"when": {name: value for name, value in written["when"].items() if value}}


def _rope(rotary: RotaryPlan) -> dict[str, Any]:
    """transformers' ``rope_parameters``."""
    if rotary.alpha == 1.0:
        return {"rope_type": "default", "rope_theta": rotary.theta}
    scaled = {"rope_type": rotary.scaling, "rope_theta": rotary.theta, "factor": 1.0 / rotary.alpha}
    if rotary.scaling == "linear":
        return scaled
    return scaled | {
        "original_max_position_embeddings": round(rotary.context_max * rotary.alpha),
        "beta_fast": rotary.beta_fast,
        "beta_slow": rotary.beta_slow,
    }


def _tiers(attention: AttentionPlan, reading: list[int]) -> dict[str, Any]:
    """The attention tiers, from a layer that has all of them; ``reading``: the layers with retrieved records."""
    local, summary, retrieved = attention.mask.local, attention.mask.summary, attention.mask.retrieved
    linear = attention.linear
    return {
        "local_attention": {
            "kind": local.kind,
            "window": local.window,
            "dilation": local.dilation,
            "unit": local.unit,
            "stride": local.stride,
        },
        "summaries": None
        if summary is None
        else {
            "block_size": summary.block_size,
            "per_block": summary.per_block,
            "levels": summary.levels,
            "fanout": summary.fanout,
            "pooling": attention.pooling,
        },
        "retrieval": None
        if retrieved is None
        else {"chunk": retrieved.chunk, "fan_in": retrieved.fan_in, "dim": attention.record_dim, "layers": reading},
        "combine": attention.combine,
        "linear_attention": None
        if linear is None
        else {"kernel": linear.kernel, "features": linear.features, "seed": linear.seed},
    }


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {"pad_token_id": None, "eos_token_id": None, "bos_token_id": None}
    return {
        "role_token_ids": dict(tokenizer.role_ids),
        "end_token_id": tokenizer.end,
        "eos_token_id": tokenizer.eod,
        "pad_token_id": tokenizer.pad,
        "bos_token_id": None,
    }


#: Arguments of a configuration that say nothing about the weights or what they compute.
_ASIDE = {"self", "kwargs", "rules_hash", "role_token_ids", "end_token_id", "use_cache"}


def run_config(config: RefractorConfig) -> RunConfig:
    """A run of the model that ``config`` describes, for folders that do not bring the configuration of theirs.

    Raises:
        ConfigError: no run can have this model; names the value.
    """
    if (config.roles, config.shared_roles) != (list(ROLES), list(SHARED_ROLES)):
        raise ConfigError(f"config.json: roles {config.roles} are not those of this version, {list(ROLES)}.")
    values = _model_values(config) | _attention_values(config)
    cfg = compose(["experiment=reference", *(f"{key}={_override(value)}" for key, value in values.items())])
    found = hf_config(cfg, None)
    for name in signature(RefractorConfig.__init__).parameters:
        if name not in _ASIDE and getattr(config, name) != getattr(found, name):
            raise ConfigError(f"config.json: {name} is {getattr(config, name)!r}, and no run can have that.")
    return cfg


def _override(value: Any) -> str:
    """A value in Hydra's grammar, whose mappings have bare keys."""
    return re.sub(r'"(\w+)": ', r"\1: ", as_text(value)) if isinstance(value, list) else as_text(value)


def _model_values(config: RefractorConfig) -> dict[str, Any]:
    """Configuration keys of shape, experts and positions."""
    rope, heads = config.rope_parameters, config.num_attention_heads
    values: dict[str, Any] = {
        "limits": "warn",
        "model.name": "imported",
        "model.d_model": config.hidden_size,
        "model.n_layers": config.num_hidden_layers,
        "model.n_heads": heads,
        "model.n_kv_heads": config.num_key_value_heads,
        "model.vocab_size": config.vocab_size,
        "model.context_max": config.max_position_embeddings,
        "model.tie_embeddings": bool(config.tie_word_embeddings),
        "model.role_embeddings": config.role_embeddings,
        "model.init_std": config.initializer_range,
        "model.norm.eps": config.rms_norm_eps,
        "model.ffn.type": "moe" if config.num_experts else "dense",
        "model.ffn.hidden": config.intermediate_size,
        "model.ffn.activation": "swiglu" if config.hidden_act == "silu" else "gelu",
        "model.rope.theta": rope["rope_theta"],
        "model.rope.alpha": 1.0 / rope.get("factor", 1.0),
        "model.rope.dim": config.rotary_dim * heads,
    }
    if config.num_experts:
        values |= {
            "model.ffn.experts": config.num_experts,
            "model.ffn.topk": config.num_experts_per_tok,
            "router.renormalize_topk": config.norm_topk_prob,
            "router.gate_temp": config.router_temperature,
            "router.gate_features": config.router_gate_features,
        }
    if rope["rope_type"] == "yarn":
        values |= {"model.rope.scaling": "yarn"}
        values |= {f"model.rope.{name}": rope[name] for name in ("beta_fast", "beta_slow") if rope.get(name)}
    return values


def _attention_values(config: RefractorConfig) -> dict[str, Any]:
    """Configuration keys of tiers, rules and cache; sequences are as long as the context."""
    local, summaries, retrieval = config.local_attention, config.summaries, config.retrieval
    linear, length = config.linear_attention, config.max_position_embeddings
    values: dict[str, Any] = {
        "train.seq_len": length,
        "safety.masks": list(config.mask_rules),
        "memory.kv.chunk": config.kv_cache["chunk"],
        "memory.kv.compress_ratio": config.kv_cache["compress_ratio"],
        "relation.linear_mode.enabled": linear is not None,
    }
    if linear is not None:
        values |= {"relation.linear_mode.L_switch": length - 1, "relation.linear_mode.kernel": linear["kernel"]}
        if linear["kernel"] == "favor+":
            values |= {"relation.linear_mode.features": linear["features"], "train.seed": linear["seed"]}
        return values
    values |= {
        "relation.combine": config.combine,
        "relation.local.pattern": local["kind"],
        "relation.local.window": length if local["window"] is None else local["window"],
        "relation.local.stride": local["stride"],
        "relation.local.dilation": local["dilation"],
        "relation.local.dilation_unit": local["unit"],
        "relation.global.summaries_per_block": summaries["per_block"] if summaries else 0,
        "relation.retrieval.enabled": retrieval is not None,
    }
    if summaries:
        values |= {f"relation.global.{name}": summaries[name] for name in ("block_size", "levels")}
        values["relation.global.type"] = summaries["pooling"]
        if summaries["levels"] == 2:
            values["relation.global.fanout"] = summaries["fanout"]
    if retrieval is not None:
        values |= {f"relation.retrieval.{name}": retrieval[name] for name in ("chunk", "fan_in", "dim", "layers")}
    return values
