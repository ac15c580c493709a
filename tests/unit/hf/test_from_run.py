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
from refractor_megatron.hf.from_run import hf_config, run_config
from refractor_megatron.hf.masking_refractor import Rules
from refractor_megatron.hf.modeling_refractor import Rotary
from refractor_megatron.tokenizer import Tokenizer
from refractor_megatron.transformation.layer_plan import plan_layers
from tests.parity.test_hf_model import CASES


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


@pytest.mark.parametrize("case", CASES)
def test_a_run_made_from_an_exported_configuration_has_its_model(case: str) -> None:
    cfg = compose(["experiment=nano", "model.context_max=128", *CASES[case]])
    config = hf_config(cfg, None)
    again = hf_config(run_config(config), None)
    assert again.to_dict() == config.to_dict()
    assert run_config(config).model.vocab_size == cfg.model.vocab_size


def test_a_configuration_that_no_run_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="head_dim"):
        run_config(RefractorConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32))
    with pytest.raises(ConfigError, match="roles"):
        run_config(RefractorConfig(roles=["user", "data", "tool"], shared_roles=[]))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused() -> None:
    tokenizer = Tokenizer([bytes([b]) for b in range(256)] + [bytes([97, b]) for b in range(256)])
    assert hf_config(compose(["experiment=nano"]), tokenizer).end_token_id == tokenizer.end
    with pytest.raises(ConfigError, match=r"521 ids.*512"):
        hf_config(compose(["experiment=nano", "model.vocab_size=512"]), tokenizer)


def test_rules_that_read_ahead_are_refused() -> None:
    masks = "safety.masks=[{name: ahead, when: {role: user}, causal: false}]"
    with pytest.raises(ConfigError, match="causal"):
        hf_config(compose(["experiment=nano", masks]), None)
