"""The exported configuration says what the run's says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from refractor_megatron.config import compose
from refractor_megatron.distinction.generators import random_rules
from refractor_megatron.distinction.rules import CompiledRules, compile_rules
from refractor_megatron.errors import ConfigError
from refractor_megatron.hf.configuration_refractor import RefractorConfig
from refractor_megatron.hf.from_run import hf_config
from refractor_megatron.hf.masking_refractor import Rules
from refractor_megatron.hf.modeling_refractor import Rotary
from refractor_megatron.tokenizer import Tokenizer
from refractor_megatron.transformation.layer_plan import plan_layers


def exported(*overrides: str) -> tuple[RefractorConfig, CompiledRules]:
    cfg = compose(["experiment=nano", *overrides])
    return hf_config(cfg, None), compile_rules(cfg.safety.masks)


def test_rules_can_be_compiled_again_and_mean_the_same() -> None:
    config, rules = exported()
    again = compile_rules(config.mask_rules, config.roles, config.shared_roles)
    assert again.digest == rules.digest == config.rules_hash


@pytest.mark.parametrize("seed", range(20))
def test_tables_are_those_of_the_training_path(seed: int) -> None:
    written = random_rules(np.random.default_rng(seed), most=5, causal=True)
    rules = compile_rules(written)
    found = Rules(RefractorConfig(mask_rules=written, roles=rules.roles, shared_roles=rules.shared_roles))
    assert torch.equal(found.table, torch.tensor(rules.table))
    assert torch.equal(found.shared, torch.tensor(rules.shared))


@pytest.mark.parametrize("rope", [[], ["alpha=0.5"], ["alpha=0.5", "scaling=yarn", "dim=32"], ["alpha=0.3", "dim=32"]])
def test_positions_are_those_of_the_training_path(rope: list[str]) -> None:
    cfg = compose(["experiment=nano", *(f"model.rope.{x}" for x in rope)])
    inv_freq, factor = plan_layers(cfg).attention[0].rotary.frequencies()
    found = Rotary(hf_config(cfg, None))
    torch.testing.assert_close(found.inv_freq, inv_freq, rtol=1e-12, atol=0)
    assert found.factor == pytest.approx(factor, rel=1e-12)


def test_survives_its_file(tmp_path: object) -> None:
    config, _ = exported("relation.retrieval.enabled=true", "memory.kv.chunk=64")
    config.save_pretrained(tmp_path)
    again = RefractorConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.kv_cache == {"chunk": 64, "compress_ratio": 0.5}


def test_a_tokenizer_of_another_size_is_refused() -> None:
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    with pytest.raises(ConfigError, match=r"265 ids.*1024"):
        hf_config(compose(["experiment=nano"]), tokenizer)


def test_rules_that_read_ahead_are_refused() -> None:
    masks = "safety.masks=[{name: ahead, when: {role: user}, causal: false}]"
    with pytest.raises(ConfigError, match="causal"):
        hf_config(compose(["experiment=nano", masks]), None)
