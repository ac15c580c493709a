"""Presets, the user's file and overrides: what wins, and that everything shipped is valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from refractor_megatron.config import RunConfig, check, compose, presets
from refractor_megatron.config.resolve import groups
from refractor_megatron.config.schema import defaults, schema

SPEC = Path(__file__).with_name("spec_12_1.yaml")
#: Fewest ranks on which each preset's grid and batch are legal.
RANKS = {"nano": 1, "pilot": 1, "small": 1, "8b": 8, "reference": 1, "pretrain_64k": 32}


def test_the_presets_are_the_promised_ones() -> None:
    assert set(presets()) == set(RANKS)


@pytest.mark.parametrize("preset", RANKS)
def test_every_preset_composes_and_passes_the_checks(preset: str) -> None:
    cfg = compose([f"experiment={preset}"])
    warnings = check(cfg, RANKS[preset])
    assert cfg.preset == preset
    assert bool(warnings) == (cfg.limits == "warn"), "enforced presets lie inside section 16, the others outside"


@pytest.mark.parametrize("preset", ["nano", "pilot"])
def test_the_small_presets_run_on_two_data_parallel_ranks(preset: str) -> None:
    warnings = check(compose([f"experiment={preset}"]), ranks=2)
    assert [warning for warning in warnings if "section 16" not in warning] == []


@pytest.mark.parametrize(("group", "choice"), [(g, c) for g, choices in groups().items() for c in choices])
def test_every_shipped_group_file_is_valid_on_its_own(group: str, choice: str) -> None:
    assert set(compose([f"{group}={choice}"]).values()) == set(schema())


def test_shipped_files_hold_only_what_differs_from_the_schema() -> None:
    cfg = compose(["experiment=nano"])
    changed = {key for key, value in cfg.values().items() if value != defaults()[key]}
    assert "model.d_model" in changed and "model.norm.eps" not in changed
    expected = {**defaults(), "train.schedule.cosine.steps": 20000}
    assert compose().values() == expected, "the reference preset is the schema's defaults"


def test_every_default_is_of_its_own_type_and_inside_its_bounds() -> None:
    from refractor_megatron.config.convert import convert

    for key, leaf in schema().items():
        converted = convert(leaf, leaf.default, "default")
        assert converted == leaf.default and type(converted) is type(leaf.default), key


def test_the_specifications_yaml_loads_verbatim_and_equals_the_reference() -> None:
    cfg = compose(file=SPEC)
    assert cfg.values() == compose().values()
    assert cfg.hash == compose().hash
    assert len(cfg.explicit) == 48
    assert cfg.unread_explicit() == [], "the preset's own value is no change"
    assert check(cfg) == []


def test_the_specifications_keys_are_marked_as_such() -> None:
    from refractor_megatron.config.yaml_file import read_yaml

    assert {key for key, leaf in schema().items() if leaf.section == "12.1"} == set(read_yaml(SPEC)[0])


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  steps: 111\n  optimizer: {lr: 5e-4}\nmodel:\nmemory:\n")
    cfg = compose(["experiment=nano", "train.steps=222", "train.schedule={warmup_steps: 3}"], file)
    assert (cfg.train.steps, cfg.train.optimizer.lr, cfg.train.schedule.warmup_steps) == (222, 5e-4, 3)
    assert cfg.train.seq_len == 128
    assert cfg.explicit == {"train.steps", "train.optimizer.lr", "train.schedule.warmup_steps"}


def test_a_group_on_the_command_line_overrides_the_experiments_choice() -> None:
    cfg = compose(["model=pilot", "experiment=nano"])
    assert (cfg.model.name, cfg.train.steps, cfg.explicit) == ("pilot", 50, frozenset())


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "lr.yaml"
    file.write_text("train: {optimizer: {lr: 2e-4}, schedule: {cosine: {min_lr: 1E-5}}}\n")
    assert compose(file=file).train.optimizer.lr == 2e-4
    assert compose(["train.optimizer.lr=2e-4"]).hash == compose(file=file).hash


def test_an_integer_is_a_number_and_zero_has_no_sign() -> None:
    assert type(compose(["model.rope.theta=10000"]).model.rope.theta) is float
    assert compose(["train.optimizer.wd=-0.0"]).hash == compose(["train.optimizer.wd=0"]).hash


def test_the_cosine_ends_with_training_unless_told_otherwise() -> None:
    assert compose(["train.steps=9000"]).train.schedule.cosine.steps == 9000
    assert compose(["train.steps=9000", "train.schedule.cosine.steps=8500"]).train.schedule.cosine.steps == 8500
    assert compose(["train.schedule.cosine.steps=null"]).unread_explicit() == []


def test_one_key_may_refer_to_another() -> None:
    cfg = compose(["train.steps=12000", "checkpoint.every=${train.steps}"])
    assert cfg.checkpoint.every == 12000


def test_force_add_sets_a_known_key() -> None:
    assert compose(["++train.steps=9000"]).train.steps == 9000


def test_a_saved_run_is_a_starting_point_with_its_own_preset(tmp_path: Path) -> None:
    first = compose(["experiment=nano", "train.seed=7"])
    first.save(tmp_path / "config.yaml")
    second = compose(["train.grad_clip=0.5"], tmp_path / "config.yaml")
    assert second.unread_explicit() == ["train.seed", "train.grad_clip"]
    assert (second.preset, second.train.seed, second.train.grad_clip) == ("nano", 7, 0.5)


def test_composing_leaves_a_callers_own_hydra_alone(tmp_path: Path) -> None:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    (tmp_path / "theirs.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        compose(["experiment=nano", "data=corpus"])
        assert GlobalHydra.instance().is_initialized()
        assert hydra.compose("theirs").a == 1


def test_python_keywords_have_their_own_name_in_yaml() -> None:
    cfg = compose(["relation.global.block_size=64"])
    assert cfg.relation.global_.block_size == 64
    tree = cfg.to_dict()
    assert tree["relation"]["global"]["block_size"] == 64 and tree["router"]["regret"]["lambda"] == 0.02
    assert not [key for key in schema() if key.endswith("_") or "_." in key]


def test_the_number_of_public_keys_is_frozen() -> None:
    """A new key is a promise to every user; change this number on purpose."""
    assert len(schema()) == 139 <= 150


def test_a_configuration_is_frozen() -> None:
    cfg = compose()
    with pytest.raises(AttributeError):
        cfg.train.steps = 3  # type: ignore[misc]
    with pytest.raises(AttributeError, match="no key 'stepz'"):
        _ = cfg.train.stepz  # type: ignore[attr-defined]
    assert RunConfig().model == cfg.model, "tracked and untracked sections compare by value"
