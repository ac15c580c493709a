"""A small exported folder with random weights and every feature that decoding must carry."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from refractor_megatron.config.sections import DEFAULT_MASKS
from refractor_megatron.decoding.load import Exported
from refractor_megatron.distinction.roles import ROLES
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.hf.configuration_refractor import RefractorConfig
from refractor_megatron.hf.modeling_refractor import RefractorForCausalLM
from refractor_megatron.tokenizer import Tokenizer, train_tokenizer
from refractor_megatron.tokenizer.hf_files import write_hf_tokenizer

CONTEXT = 1024
RULES = compile_rules(DEFAULT_MASKS)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A vocabulary of 400."""
    return train_tokenizer([inspect.getsource(argparse).encode()], 400)


def make_config(tokenizer: Tokenizer, **changes: Any) -> RefractorConfig:
    """Three layers with experts, role and scope features, a window of 24 and two summaries per block of 8."""
    values: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2,
        "router_gate_features": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "max_position_embeddings": CONTEXT, "initializer_range": 0.25, "roles": list(ROLES),
        "mask_rules": [dict(rule) for rule in DEFAULT_MASKS], "rules_hash": RULES.digest,
        "local_attention": {"kind": "sliding", "window": 24},
        "summaries": {"block_size": 8, "per_block": 2, "levels": 1, "fanout": 4, "pooling": "attn_pool"},
        "role_token_ids": dict(tokenizer.role_ids), "end_token_id": tokenizer.end, "eos_token_id": tokenizer.eod,
        "pad_token_id": tokenizer.pad, "architectures": ["RefractorForCausalLM"],
        "kv_cache": {"chunk": 32, "compress_ratio": 0.7},
    }  # fmt: skip
    return RefractorConfig(**(values | changes))


def make_exported(tokenizer: Tokenizer, **changes: Any) -> Exported:
    """Random weights in double precision, so that what should be equal is equal whatever the shape of a product."""
    torch.manual_seed(7)
    config = make_config(tokenizer, **changes)
    model = RefractorForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.abs().max() == 0:  # role table, tier gates, features of the router
                weight.normal_(std=0.5)
            assert weight.isfinite().all(), name
    return Exported(model, config, tokenizer)


@pytest.fixture(scope="session")
def exported(tokenizer: Tokenizer) -> Exported:
    """The model in memory."""
    return make_exported(tokenizer)


@pytest.fixture(scope="session")
def folder(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as an exported folder, in float32."""
    path = tmp_path_factory.mktemp("exported")
    model = RefractorForCausalLM(exported.config)
    model.load_state_dict(exported.model.state_dict())
    model.save_pretrained(path)
    write_hf_tokenizer(exported.tokenizer, path, CONTEXT)
    return path
