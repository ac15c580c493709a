"""Configurations of Llama, Mistral and Mixtral as ours and back; transformers' own defaults are the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refractor_megatron.checkpoint.convert.foreign_config import FAMILIES, Foreign, read_config
from refractor_megatron.checkpoint.convert.foreign_export import foreign_body
from refractor_megatron.hf.from_run import hf_config
from refractor_megatron.transformation.layer_plan import plan_layers

NEEDED = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "max_position_embeddings": 8192,
}

THETA = {"rope_theta": 2e4}
YARN = {"factor": 4.0, "original_max_position_embeddings": 2048}


def read(folder: Path, body: dict[str, Any]) -> Foreign:
    (folder / "config.json").write_text(json.dumps(body))
    return read_config(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_file_leaves_out_is_what_transformers_assumes(tmp_path: Path, family: str) -> None:
    ours = hf_config(read(tmp_path, {"model_type": family, **NEEDED}).cfg, None)
    theirs = transformers.AutoConfig.for_model(family, **NEEDED)
    for name in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "initializer_range"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_parameters == theirs.rope_parameters
    assert ours.local_attention["window"] == getattr(theirs, "sliding_window", None)
    assert ours.num_experts == getattr(theirs, "num_local_experts", 0)
    if family == "mixtral":
        assert ours.num_experts_per_tok == theirs.num_experts_per_tok and ours.norm_topk_prob


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_of_ours_is_off(tmp_path: Path, family: str) -> None:
    """Also beyond the length at which our own models turn to linear attention."""
    body = {"model_type": family, **NEEDED, "max_position_embeddings": 131072, "sliding_window": None}
    cfg = read(tmp_path, body).cfg
    config = hf_config(cfg, None)
    assert (config.summaries, config.retrieval, config.linear_attention, config.mask_rules) == (None, None, None, [])
    assert not config.role_embeddings and not config.role_token_ids and config.eos_token_id is None
    assert config.local_attention["window"] is None and config.combine == "joint"
    assert all(one.mask.summary is None and one.linear is None for one in plan_layers(cfg).attention)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        (THETA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, THETA | {"rope_type": "linear", "factor": 2.0}),
        (THETA | {"rope_scaling": {"type": "yarn", **YARN}}, THETA | {"rope_type": "yarn", **YARN}),
    ],
)  # fmt: skip
def test_positions_as_older_files_spell_them(tmp_path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    before = read(tmp_path, {"model_type": "llama", **NEEDED, **old}).cfg
    after = read(tmp_path, {"model_type": "llama", **NEEDED, "rope_parameters": new}).cfg
    assert before.hash == after.hash
    assert hf_config(after, None).rope_parameters.items() >= new.items()


def test_yarn_reaches_as_far_as_its_factor_says(tmp_path: Path) -> None:
    """A file may name the original length as the longest one; the longest is that times the factor."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8192}
    cfg = read(tmp_path, {"model_type": "llama", **NEEDED, "rope_parameters": rope}).cfg
    assert cfg.model.context_max == 32768


def test_unknown_keys_are_named(tmp_path: Path) -> None:
    foreign = read(tmp_path, {"model_type": "llama", **NEEDED, "logit_softcap": 30.0, "torch_dtype": "bfloat16"})
    assert len(foreign.notes) == 1 and "not used: logit_softcap" in foreign.notes[0]
    assert foreign.cfg.train.mixed_precision == "bf16"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(FAMILIES),
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.sampled_from([1, 2, 3]),
    half=st.integers(1, 8),
    numbers=st.tuples(st.integers(512, 3000), st.integers(1, 99), st.integers(1, 5), st.integers(64, 5000)),
    eps=st.floats(1e-8, 1e-2),
    theta=st.floats(2.0, 1e7),
    tied=st.booleans(),
    window=st.none() | st.integers(1, 6000),
    factor=st.none() | st.floats(1.0, 64.0),
)
def test_there_and_back(
    tmp_path: Path,
    family: str,
    groups: int,
    per_group: int,
    half: int,
    numbers: tuple[int, int, int, int],
    eps: float,
    theta: float,
    tied: bool,
    window: int | None,
    factor: float | None,
) -> None:
    """Ours, written as theirs and read again, is the same configuration."""
    vocab, hidden, layers, length = numbers
    heads = groups * per_group
    rope = {"rope_type": "default"} if factor is None else {"rope_type": "linear", "factor": factor}
    body = {
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": heads * 2 * half,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": length,
        "rms_norm_eps": eps,
        "rope_parameters": {**rope, "rope_theta": theta},
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
        **({} if family == "llama" else {"sliding_window": window}),
    }
    once = read(tmp_path, body).cfg
    export = foreign_body(hf_config(once, None), family, "bfloat16", drop_tiers=False)
    assert export.left_out == ()
    again = read(tmp_path, export.body).cfg
    before, after = once.values(), again.values()
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {"model.rope.alpha"}  # 1 / factor, with factor written to twelve digits
    assert after["model.rope.alpha"] == pytest.approx(before["model.rope.alpha"], rel=1e-11)
    shown = transformers.AutoConfig.from_pretrained(tmp_path)
    assert shown.model_type == family and shown.num_key_value_heads == groups
