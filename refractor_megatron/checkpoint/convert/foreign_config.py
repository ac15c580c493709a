"""Configurations of other decoders (``config.json`` of Llama, Mistral, Mixtral) as ours, with every tier off.

A key that would change what the model computes and that REFRACTOR cannot express is refused, never dropped. Keys
without any effect on inference are known by name; the rest is named in a note.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import RunConfig, compose
from ...config.limits import check
from ...config.schema import as_text, schema
from ...errors import CheckpointError, ConfigError

CONFIG = "config.json"
#: What ``dtype`` of a ``config.json`` may be.
DTYPE_NAMES = ("float32", "bfloat16", "float16")

#: What transformers assumes where a file leaves a key out, by family; None: the file must say it.
_COMMON: dict[str, Any] = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "max_position_embeddings": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 1e4,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"attention_bias": False, "mlp_bias": False},
    "mistral": _COMMON | {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": _COMMON
    | {
        "num_key_value_heads": 8,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
FAMILIES = tuple(_DEFAULTS)

#: Keys that say nothing about what the weights compute: training, generation, bookkeeping.
_WITHOUT_EFFECT = re.findall(
    r"\w+",
    "model_type architectures dtype torch_dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id "
    "attention_dropout pretraining_tp output_router_logits router_aux_loss_coef router_jitter_noise _name_or_path "
    "auto_map id2label label2id return_dict output_hidden_states output_attentions chunk_size_feed_forward "
    "is_encoder_decoder problem_type unsloth_version",
)
_READ = re.findall(
    r"\w+",
    "head_dim rope_parameters rope_scaling rope_theta num_key_value_heads sliding_window attention_bias mlp_bias "
    "num_local_experts num_experts_per_tok layer_types partial_rotary_factor quantization_config",
)


@dataclass(frozen=True)
class Foreign:
    """A foreign model as ours."""

    family: str  # model_type
    cfg: RunConfig  # tiers off
    body: Mapping[str, Any]  # its config.json
    notes: tuple[str, ...]
    rows: int = 0  # vocabulary rows that ``cfg`` has and the source lacks


def read_config(folder: Path, ids: int = 0) -> Foreign:
    """The model that ``folder/config.json`` describes, its vocabulary grown to ``ids`` where it is smaller.

    Raises:
        CheckpointError: the file is missing or damaged, of another family, or asks for what REFRACTOR cannot express.
    """
    path = folder / CONFIG
    try:
        body = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): give the whole folder.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}): take another copy.") from None
    if not isinstance(body, dict) or body.get("model_type") not in FAMILIES:
        kind = body.get("model_type") if isinstance(body, dict) else None
        raise CheckpointError(
            f"{path}: model_type {kind!r} cannot be imported; the supported ones are {', '.join(FAMILIES)}."
        )
    get = _Reader(path, body)
    vocab_size = get.count("vocab_size")
    cfg = _run_config(path, body, max(vocab_size, ids))
    return Foreign(body["model_type"], cfg, body, _notes(path, body), max(ids - vocab_size, 0))


def _run_config(path: Path, body: Mapping[str, Any], vocab_size: int) -> RunConfig:
    get = _Reader(path, body)
    heads, hidden, length = (
        get.count("num_attention_heads"),
        get.count("hidden_size"),
        get.count("max_position_embeddings"),
    )
    rope, length = _rope(get, length)
    kv_heads = body.get("num_key_value_heads") or _DEFAULTS[get.family].get("num_key_value_heads") or heads
    _refuse_the_rest(get, heads, hidden)
    window = get.value("sliding_window") if get.family != "llama" else None
    values: dict[str, Any] = {
        "limits": "warn",
        "model.name": get.family,
        "model.d_model": hidden,
        "model.n_layers": get.count("num_hidden_layers"),
        "model.n_heads": heads,
        "model.n_kv_heads": kv_heads,
        "model.vocab_size": vocab_size,
        "model.context_max": length,
        "model.tie_embeddings": bool(get.value("tie_word_embeddings")),
        "model.role_embeddings": False,
        "model.init_std": float(get.value("initializer_range")),
        "model.ffn.hidden": get.count("intermediate_size"),
        "model.norm.eps": float(get.value("rms_norm_eps")),
        "model.rope.dim": hidden,
        **rope,
        "relation.local.window": min(window or length, length),
        "relation.global.summaries_per_block": 0,
        "relation.linear_mode.enabled": False,
        "train.seq_len": length,
        "train.mixed_precision": "fp32" if body.get("dtype", body.get("torch_dtype")) == "float32" else "bf16",
    }
    if get.family == "mixtral":
        values |= {
            "model.ffn.type": "moe",
            "model.ffn.experts": get.count("num_local_experts"),
            "model.ffn.topk": get.count("num_experts_per_tok"),
        }
    else:
        values["model.ffn.type"] = "dense"
    smallest = schema()["model.vocab_size"].bounds
    if smallest is not None and smallest.ge is not None and values["model.vocab_size"] < smallest.ge:
        raise CheckpointError(
            f"{path}: vocab_size {values['model.vocab_size']} is below the {smallest.ge:g} ids that REFRACTOR needs."
        )
    try:
        cfg = compose(
            ["experiment=reference", "safety=open", *(f"{key}={as_text(value)}" for key, value in values.items())]
        )
        check(cfg)
    except ConfigError as error:
        raise CheckpointError(f"{path} describes a model that REFRACTOR cannot build: {error}") from None
    return cfg


class _Reader:
    """Values of a ``config.json`` with the family's defaults."""

    def __init__(self, path: Path, body: Mapping[str, Any]) -> None:
        self.path, self.body, self.family = path, body, str(body["model_type"])

    def value(self, key: str) -> Any:
        """``key``, or what transformers assumes without it."""
        if (found := self.body.get(key)) is not None or (key == "sliding_window" and key in self.body):
            return found
        if (found := _DEFAULTS[self.family].get(key)) is None and key in _COMMON:
            raise CheckpointError(f"{self.path}: {key} is missing, and the model cannot be built without it.")
        return found

    def count(self, key: str) -> int:
        """``key`` as a positive whole number."""
        found = self.value(key)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise CheckpointError(f"{self.path}: {key} is {found!r} and must be a positive whole number.")
        return found

    def refuse(self, what: str, why: str) -> CheckpointError:
        """One sentence."""
        return CheckpointError(f"{self.path}: {what}, {why}; this model cannot be imported.")


def _rope(get: _Reader, length: int) -> tuple[dict[str, Any], int]:
    """Keys of ``model.rope``, and the longest sequence: for YaRN the original length times the factor."""
    body = get.body
    rope = dict(body.get("rope_parameters") or body.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or get.value("rope_theta"))
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    factor, original = rope.pop("factor", None), rope.pop("original_max_position_embeddings", None)
    beta = {name: rope.pop(name, None) for name in ("beta_fast", "beta_slow")}
    temperature = rope.pop("attention_factor", None)
    if kind not in ("default", "linear", "yarn"):
        raise get.refuse(f"rope_type {kind!r}", "and REFRACTOR has the frequencies of default, linear and yarn only")
    odd = sorted(
        name for name, value in rope.items() if value not in (None, 1.0) or name in ("mscale", "mscale_all_dim")
    )
    if odd:
        raise get.refuse(
            f"rope_parameters.{odd[0]} is {rope[odd[0]]!r}", "which REFRACTOR's rotary positions cannot do"
        )
    keys: dict[str, Any] = {"model.rope.theta": theta, "model.rope.alpha": 1.0}
    if kind == "default":
        return keys, length
    if not isinstance(factor, int | float) or factor < 1:
        raise get.refuse(f"rope_parameters.factor is {factor!r}", f"and {kind} needs a factor of 1 or more")
    keys |= {"model.rope.alpha": 1.0 / factor, "model.rope.scaling": kind}
    if kind == "linear" or factor == 1:
        return keys, length
    usual = 0.1 * math.log(factor) + 1.0
    if temperature is not None and not math.isclose(temperature, usual, rel_tol=1e-6):
        raise get.refuse(f"rope_parameters.attention_factor is {temperature}", f"and REFRACTOR's is {usual:.6g}")
    keys |= {
        "model.rope.beta_fast": float(beta["beta_fast"] or 32.0),
        "model.rope.beta_slow": float(beta["beta_slow"] or 1.0),
    }
    return keys, round((original or length) * factor)


def _refuse_the_rest(get: _Reader, heads: int, hidden: int) -> None:
    """Everything else that would change what the weights compute."""
    body = get.body
    for key in ("attention_bias", "mlp_bias"):
        if body.get(key):
            raise get.refuse(f"{key} is true", "and REFRACTOR's linear layers have no bias")
    if get.value("hidden_act") != "silu":
        raise get.refuse(f"hidden_act is {body['hidden_act']!r}", "and a gated REFRACTOR feed-forward uses silu")
    head_dim = body.get("head_dim")
    if head_dim is not None and head_dim * heads != hidden:
        raise get.refuse(
            f"head_dim {head_dim} times {heads} heads is not hidden_size {hidden}",
            "and in REFRACTOR heads share the width of the model",
        )
    if body.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise get.refuse(
            f"partial_rotary_factor is {body['partial_rotary_factor']}", "and the family rotates whole heads"
        )
    if body.get("quantization_config"):
        raise get.refuse("quantization_config is set", "and only fp32, bf16 and fp16 weights are read")
    dtype = body.get("dtype", body.get("torch_dtype"))
    if dtype is not None and (not isinstance(dtype, str) or dtype.removeprefix("torch.") not in DTYPE_NAMES):
        raise CheckpointError(f"{get.path}: dtype {dtype!r} is unknown; the known ones are {', '.join(DTYPE_NAMES)}.")
    kinds = set(body.get("layer_types") or ())
    window = get.value("sliding_window") if get.family != "llama" else None
    if kinds - {"sliding_attention" if window else "full_attention"}:
        raise get.refuse(
            f"layer_types names {', '.join(sorted(kinds))}", "and all layers of a REFRACTOR model are alike"
        )


def _notes(path: Path, body: Mapping[str, Any]) -> tuple[str, ...]:
    unknown = sorted(set(body) - {*_DEFAULTS[body["model_type"]], *_WITHOUT_EFFECT, *_READ})
    return (f"{path}: not understood and not used: {', '.join(unknown)}",) if unknown else ()
