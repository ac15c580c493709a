"""One sentence for each mistake a user can make, with the key or file and the way out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refractor_megatron.config import compose
from refractor_megatron.errors import ConfigError

OVERRIDES = {
    "trian.steps=3": "command line, trian.steps=3: unknown key trian.steps; did you mean train.steps.",
    "lr=3": "command line, lr=3: unknown key lr; did you mean train.optimizer.lr.",
    "qqqq=3": "command line, qqqq=3: unknown key qqqq; `refractor config show` lists every key.",
    "modle=8b": "command line, modle=8b: unknown key modle; did you mean model.",
    "relation.global_.block_size=64": (
        "command line, relation.global_.block_size=64: unknown key relation.global_.block_size; "
        "did you mean relation.global.block_size."
    ),
    "train={stepz: 3}": "command line, train={stepz: 3}: unknown key train.stepz; did you mean train.steps.",
    "model=9b": "command line: model=9b is none of 8b, nano, pilot, reference, small.",
    "experiment=pilto": (
        "command line: experiment=pilto is none of 8b, nano, pilot, pretrain_64k, reference, small; did you mean pilot."
    ),
    "train.steps=abc": "command line, train.steps=abc: train.steps must be an integer, not 'abc' (a string).",
    "train.steps=true": "command line, train.steps=true: train.steps must be an integer, not true (a boolean).",
    "train.steps=1e3": "command line, train.steps=1e3: train.steps must be an integer, not 1000 (a number); "
    "write 1000.",
    "train.steps=": "command line, train.steps=: train.steps must be an integer, not '' (a string).",
    "train.steps=null": "command line, train.steps=null: train.steps must be an integer, not null (empty).",
    "train.steps=0": "command line, train.steps=0: train.steps must be >= 1, not 0.",
    "train.optimizer.lr='2e-4'": (
        "command line, train.optimizer.lr='2e-4': train.optimizer.lr must be a number, not '2e-4' (a string); "
        "write the number without quotes."
    ),
    "train.optimizer.lr=inf": "command line, train.optimizer.lr=inf: train.optimizer.lr must be a finite number, "
    "not inf.",
    "train.ema.enabled=1": "command line, train.ema.enabled=1: train.ema.enabled must be true or false, not 1 "
    "(an integer).",
    "model.name=7": "command line, model.name=7: model.name must be a string, not 7 (an integer).",
    "limits=enforced": (
        "command line, limits=enforced: limits must be one of enforce, warn, not 'enforced'; did you mean enforce."
    ),
    "relation.local.pattern=dilate": (
        "command line, relation.local.pattern=dilate: relation.local.pattern must be one of sliding, dilated, block, "
        "hybrid, not 'dilate'; did you mean dilated."
    ),
    "safety.masks=3": "command line, safety.masks=3: safety.masks must be a list of mask rules, not 3 (an integer).",
    "safety.masks=[3]": "command line, safety.masks=[3]: safety.masks[0] must be a mapping with a name, not 3.",
    "model.rope=3": (
        "command line, model.rope=3: model.rope is a section, not a value; set a key below it, "
        "like model.rope.theta=VALUE."
    ),
    "train.steps": (
        "command line, train.steps: not an override; write KEY=VALUE, and quote a value with special characters."
    ),
    "train.optimizer.lr=[1": (
        "command line, train.optimizer.lr=[1: not an override; write KEY=VALUE, and quote a value with special "
        "characters."
    ),
    "train.steps=1,2": (
        "command line, train.steps=1,2: a run has one value per key; start one run per value, or put a list in "
        "brackets."
    ),
    "~train.steps": (
        "command line, ~train.steps: keys cannot be removed; leave the override out to keep the preset's value."
    ),
    "+train.steps=3": "command line, +train.steps=3: there are no keys to add; write train.steps=3.",
    "+train.stepz=3": "command line, +train.stepz=3: unknown key train.stepz; did you mean train.steps.",
    "model@train=8b": "command line, model@train=8b: a group cannot move to another place; write model=CHOICE.",
    "train.steps=${nowhere}": (
        "command line, train.steps=${nowhere}: train.steps=${nowhere} names no key that has a value; write a plain "
        "value or the dotted name of another key in ${}."
    ),
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_override_gets_one_sentence(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    assert str(caught.value) == OVERRIDES[override]
    assert caught.value.__cause__ is None and (caught.value.__context__ is None or caught.value.__suppress_context__)


FILES = {
    "unknown key": (
        "train:\n  steps: 3\n  optimiser:\n    lr: 1\n",
        " line 3: unknown key train.optimiser; did you mean train.optimizer.",
    ),
    "unknown section": ("trian:\n  steps: 3\n", " line 1: unknown key trian; did you mean train."),
    "mistyped": ("train:\n  steps: many\n", " line 2: train.steps must be an integer, not 'many' (a string)."),
    "yes is no string": ("limits: yes\n", " line 1: limits must be one of enforce, warn, not true (a boolean)."),
    "section is a value": ("train: 3\n", " line 1: train must be a mapping of keys to values."),
    "value is a section": (
        "train:\n  steps: {a: 1}\n",
        ' line 2: train.steps must be an integer, not {"a": 1} (a mapping).',
    ),
    "root is a list": ("- 1\n", " line 1: the file must be a mapping of keys to values."),
    "given twice": (
        "train:\n  steps: 3\n  steps: 4\n",
        " line 3: train.steps stands here for the second time (first in line 2); keep one.",
    ),
    "merge key": (
        "train:\n  <<: {steps: 3}\n",
        " line 2: a key must be a plain name; merge keys and nested keys are not understood here.",
    ),
    "indentation": (
        "train:\n  steps: 3\n seed: 4\n",
        " line 3: YAML error, expected <block end>, but found '<block mapping start>'.",
    ),
    "tab": ("train:\n\tsteps: 3\n", " line 2: YAML error, found character '\\t' that cannot start any token."),
    "two documents": ("train: {steps: 3}\n---\nlimits: warn\n", " line 2: YAML error, but found another document."),
    "foreign tag": (
        "train: {steps: !!python/object:os.system 3}\n",
        " line 1: YAML error, could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object:os.system'.",
    ),
    "control character": ("train: \x01\n", ": YAML error, special characters are not allowed."),
    "header of no preset": (
        "resolved: {preset: huge}\n",
        ": its preset 'huge' is none of 8b, nano, pilot, pretrain_64k, reference, small; name one with "
        "experiment=PRESET.",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_gets_one_sentence_with_the_line(case: str, tmp_path: Path) -> None:
    text, message = FILES[case]
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose(file=file)
    assert str(caught.value) == f"{file}{message}"


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing yet\n")
    assert compose(file=file).hash == compose().hash


def test_a_missing_file(tmp_path: Path) -> None:
    file = tmp_path / "absent.yaml"
    with pytest.raises(ConfigError) as caught:
        compose(file=file)
    assert str(caught.value) == f"{file}: there is no such file; give the path of a YAML configuration."


def test_a_folder_or_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\); give a readable YAML file\."):
        compose(file=tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "latin1.yaml"
    file.write_bytes(b"model: {name: caf\xe9}\n")
    with pytest.raises(ConfigError) as caught:
        compose(file=file)
    assert str(caught.value) == f"{file}: byte 17 is not UTF-8; save the file as UTF-8 text."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    file = tmp_path / "secret.yaml"
    file.write_text("limits: warn\n")
    file.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        compose(file=file)
