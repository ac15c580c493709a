"""Hashes, saving and loading, and the account of which keys were read."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.config import RunConfig, compose
from refractor_megatron.config.schema import schema
from refractor_megatron.config.tree import Leaf
from refractor_megatron.errors import ConfigError, OutputError

BASE = compose(["experiment=nano"])


def other_value(leaf: Leaf, current: Any, draw: st.DataObject) -> Any:
    """A legal value of ``leaf`` that is not ``current``."""
    low = leaf.bounds.ge if leaf.bounds.ge is not None else leaf.bounds.gt
    high = leaf.bounds.le if leaf.bounds.le is not None else leaf.bounds.lt
    strategy: st.SearchStrategy[Any]
    if leaf.choices:
        strategy = st.sampled_from(leaf.choices)
    elif leaf.kind is bool:
        strategy = st.booleans()
    elif leaf.kind is int:
        strategy = st.integers(
            int(low or 0) + int(low is None or low == leaf.bounds.gt),
            int(high or 2**40) - int(leaf.bounds.lt is not None),
        )
    elif leaf.kind is float:
        strategy = st.floats(low if low is not None else 0.0, high if high is not None else 1e9)
    elif leaf.kind is tuple:
        another = {dict: {"name": "another", "when": {"role": "tool"}}, int: 1, str: "another"}
        strategy = st.just((another[leaf.element],))
    else:
        strategy = st.text("abcdefgh", min_size=1)
    return draw.draw(strategy.filter(lambda value: value != current))


CHANGEABLE = [key for key, leaf in schema().items() if len(leaf.choices) != 1]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_other_value_of_any_leaf_is_another_hash(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(CHANGEABLE))
    values = BASE.values()
    values[key] = other_value(schema()[key], values[key], data)
    changed = RunConfig.from_values(values, preset="nano", baseline={})
    assert changed.hash != BASE.hash
    assert (changed.fixed_hash == BASE.fixed_hash) == (schema()[key].resume == "free")


def test_the_hash_depends_on_values_alone() -> None:
    assert BASE.hash == compose(["experiment=nano", "train.steps=50"]).hash
    assert len(BASE.hash) == 16 and int(BASE.hash, 16) >= 0
    before = BASE.hash
    _ = BASE.train.steps, BASE.safety.masks
    assert BASE.hash == before


def test_what_a_resumed_run_may_change() -> None:
    free = {key for key, leaf in schema().items() if leaf.resume == "free"}
    whole = ("telemetry", "checkpoint", "evaluation", "parallel")
    assert free == {key for key in schema() if key.split(".")[0] in whole} | {
        "limits",
        "data.engine.kind",
        "data.engine.workers",
        "data.engine.arguments",
        "train.steps",
        "relation.backend",
        "model.name",
    }


def test_saving_and_loading_keeps_everything(tmp_path: Path) -> None:
    cfg = compose(["experiment=nano", "data.name='1e5'", "train.optimizer.lr=2e-4", "train.steps=50"])
    path = tmp_path / "runs" / "nano" / "config.yaml"
    cfg.save(path)
    loaded = RunConfig.load(path)
    assert loaded.values() == cfg.values() and loaded == cfg
    assert (loaded.hash, loaded.fixed_hash, loaded.preset) == (cfg.hash, cfg.fixed_hash, "nano")
    assert loaded.explicit == {"data.name", "train.optimizer.lr", "train.steps"}
    assert loaded.unread_explicit() == ["train.optimizer.lr", "data.name"]
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]


@settings(max_examples=50, deadline=None)
@given(name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True), lr=st.floats(1e-12, 1e3))
def test_any_string_and_number_survives_the_file(
    name: str, lr: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = {**BASE.values(), "data.name": name, "train.optimizer.lr": lr}
    path = tmp_path_factory.getbasetemp() / "survives.yaml"
    RunConfig.from_values(values, preset="nano", baseline={}).save(path)
    assert RunConfig.load(path).values() == values


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 50", "steps: 51", "edited by hand, its keys hash to"),
        ("  seed: 1234\n", "", "train.seed missing"),
        ("  seed: 1234\n", "  seed: 1234\n  sed: 4\n", "unknown key train.sed; did you mean train.seed"),
        ("resolved:", "resolvd:", "unknown key resolvd"),
        ("  preset: nano\n", "", "this is no resolved configuration"),
        ("seed: 1234", "seed: '1234'", "train.seed must be an integer"),
    ],
)
def test_an_edited_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    BASE.save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as caught:
        RunConfig.load(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    BASE.save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError):
            RunConfig.load(path)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written .* choose a writable output folder"):
        BASE.save(tmp_path / "taken" / "config.yaml")


def test_reading_is_noticed_leaf_by_leaf() -> None:
    cfg = compose(["experiment=nano"])
    cfg.values(), cfg.to_dict(), cfg.hash, cfg.fixed_hash, repr(cfg), hash(cfg), cfg == BASE, cfg.unread_explicit()
    assert cfg.read_keys() == set()
    section = cfg.train.optimizer
    assert cfg.read_keys() == set(), "passing a section on is not reading it"
    assert section.lr == section.lr == 3e-3
    assert cfg.router.regret.lambda_ == 0.02 and cfg.limits == "warn"
    assert cfg.read_keys() == {"train.optimizer.lr", "router.regret.lambda", "limits"}


def test_a_key_that_the_user_changed_and_nothing_read_is_an_error() -> None:
    cfg = compose(["experiment=nano", "train.seed=5", "train.grad_clip=0.5", "train.steps=50", "model.context_max=256"])
    assert cfg.unread_explicit() == ["train.seed", "train.grad_clip"], "same as the preset, or only checked: no error"
    _ = cfg.train.seed
    with pytest.raises(ConfigError) as caught:
        cfg.require_all_read()
    assert str(caught.value) == (
        "train.grad_clip=0.5 has no effect on this run: nothing reads it with the other settings of preset nano; "
        "remove it, or see `refractor config explain train.grad_clip`."
    )
    cfg.require_all_read({"train.seed", "train.grad_clip"})
    with pytest.raises(ConfigError, match="train.seed=5, train.grad_clip=0.5 have no effect"):
        cfg.require_all_read(set())


def test_copies_and_pickles_are_equal_and_keep_their_own_account() -> None:
    cfg = compose(["experiment=nano"])
    for twin in (copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert twin == cfg and twin.hash == cfg.hash
        assert twin.model.d_model == 64 and cfg.read_keys() == set()


def test_values_are_copies() -> None:
    cfg = compose()
    cfg.values()["safety.masks"][0]["name"] = "changed"
    cfg.to_dict()["safety"]["masks"].clear()
    assert cfg.hash == compose().hash


def test_a_configuration_made_by_hand_works_untracked() -> None:
    cfg = RunConfig()
    assert cfg.model.d_model == 4096 and cfg.read_keys() == set() and cfg.unread_explicit() == []
    assert cfg == RunConfig() and cfg != compose(["train.seed=3"])
