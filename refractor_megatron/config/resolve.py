"""Preset + user's file + command line -> one ``RunConfig``.

Hydra 1.3 composes the preset from the groups under ``hydra_conf`` and parses the overrides; the schema decides what a
key is and which values it takes. Later sources win: schema defaults, group files, the user's file, the command line.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .convert import convert, did_you_mean, leaf_of, sections, unknown_key
from .schema import RunConfig, as_text, defaults, schema
from .tree import Value
from .yaml_file import Entry, read_yaml

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

#: Group whose files are complete runs.
PRESET_GROUP = "experiment"
_COMMAND_LINE = "command line"


def compose(overrides: Sequence[str] = (), file: Path | None = None) -> RunConfig:
    """A run from Hydra overrides (``experiment=pilot``, ``model=8b``, ``train.steps=100``) and a YAML file.

    Without ``experiment=`` the preset is ``reference``, or the one a saved run in ``file`` came from. Raises
    ``ConfigError``, one sentence, for a malformed override, an unknown group, choice or key (with the nearest match), a
    mistyped or out-of-bounds value, and a missing or broken file.
    """
    choices, changes = _sort_overrides(overrides)
    entries: dict[str, Entry] = {}
    if file is not None:
        entries, header = read_yaml(file)
        _adopt_preset(choices, header, file)
    preset = choices.get(PRESET_GROUP, "reference")
    base = preset_values(tuple(sorted(choices.items())))
    entries.update(changes)
    values = dict(base)
    values.update({key: entry.value for key, entry in entries.items()})
    values = _interpolate(values, entries)
    for key, entry in entries.items():
        values[key] = convert(schema()[key], values[key], entry.where)
    _materialise(values)
    _materialise(base)
    return RunConfig.from_values(values, preset=preset, baseline={key: base[key] for key in entries})


def presets() -> list[str]:
    """Names of the complete runs that ship with the package."""
    return list(groups()[PRESET_GROUP])


@functools.cache
def groups() -> Mapping[str, tuple[str, ...]]:
    """Group names and the choices of each."""
    found = {}
    for folder in sorted(_conf_dir().iterdir()):
        if folder.is_dir() and not folder.name.startswith(("_", ".")):
            found[folder.name] = tuple(sorted(path.stem for path in folder.glob("*.yaml")))
    return found


@functools.cache
def _conf_dir() -> Path:
    root = Path(str(files("hydra_conf")))
    assert (root / "config.yaml").is_file(), f"hydra_conf was installed without its YAML files: {root}"
    return root


def preset_values(choices: tuple[tuple[str, str], ...]) -> dict[str, Value]:
    """Every leaf by dotted key for these group choices; the keys and values of our own files are checked too."""
    return dict(_composed(choices))


@functools.lru_cache(maxsize=64)
def _composed(choices: tuple[tuple[str, str], ...]) -> Mapping[str, Value]:
    overrides = [f"{group}={choice}" for group, choice in choices]
    return {**defaults(), **flatten(_hydra_tree(overrides), f"hydra_conf {' '.join(overrides)}")}


def _hydra_tree(overrides: list[str]) -> dict[Any, Any]:
    """What Hydra makes of ``hydra_conf``. A Hydra application that calls us keeps its own global state."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    callers = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(_conf_dir()), version_base="1.3"):
            tree = OmegaConf.to_container(hydra.compose("config", overrides), resolve=True)
    except HydraException as error:
        raise AssertionError(f"hydra_conf does not compose with {overrides}: {error}") from error
    finally:
        GlobalHydra.instance().hydra = callers
    assert isinstance(tree, dict)
    return tree


def flatten(tree: Mapping[Any, Any], where: str, prefix: str = "") -> dict[str, Value]:
    """Converted values by dotted key of a nested mapping; raises ``ConfigError`` for keys that the schema lacks."""
    found: dict[str, Value] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key in sections():
            found.update(flatten(value, where, key + "."))
        else:
            found[key] = convert(leaf_of(key, where), value, where)
    return found


def _adopt_preset(choices: dict[str, str], header: Mapping[str, Any], file: Path) -> None:
    """A saved run given as ``file`` starts from the preset it was made from, unless the command line names one."""
    if PRESET_GROUP in choices or not header:
        return
    preset = header.get("preset")
    if preset not in presets():
        raise ConfigError(
            f"{file}: its preset {preset!r} is none of {', '.join(presets())}; name one with experiment=PRESET."
        )
    choices[PRESET_GROUP] = str(preset)


def _sort_overrides(overrides: Sequence[str]) -> tuple[dict[str, str], dict[str, Entry]]:
    """Group choices, and value changes by dotted key."""
    choices: dict[str, str] = {}
    changes: dict[str, Entry] = {}
    for override in map(_parse, overrides):
        key, value = override.key_or_group, override.value()
        if key in groups() and not isinstance(value, dict):
            choices[key] = _choice(key, value)
            continue
        where = f"{_COMMAND_LINE}, {override.input_line}"
        if isinstance(value, dict) and key in sections():
            changes.update({inner: Entry(given, where) for inner, given in _leaves_below(value, key, where)})
        elif key in sections():
            raise ConfigError(f"{where}: {key} is a section, not a value; set a key below it, like {_child(key)}.")
        else:
            leaf_of(key, where)
            changes[key] = Entry(value, where)
    return choices, changes


def _parse(text: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    where = f"{_COMMAND_LINE}, {text}"
    try:
        override: Override = OverridesParser.create().parse_overrides([text])[0]
    except HydraException:
        raise ConfigError(
            f"{where}: not an override; write KEY=VALUE, and quote a value with special characters."
        ) from None
    if override.is_sweep_override():
        raise ConfigError(f"{where}: a run has one value per key; start one run per value, or put a list in brackets.")
    if override.type == OverrideType.DEL:
        raise ConfigError(f"{where}: keys cannot be removed; leave the override out to keep the preset's value.")
    if override.type == OverrideType.ADD:
        key = override.key_or_group
        if key not in schema() and key not in sections() and key not in groups():
            raise unknown_key(key, where)
        raise ConfigError(f"{where}: there are no keys to add; write {text.lstrip('+')}.")
    if override.package is not None:
        raise ConfigError(f"{where}: a group cannot move to another place; write {override.key_or_group}=CHOICE.")
    return override


def _choice(group: str, value: object) -> str:
    known = groups()[group]
    name = as_text(value)
    if name not in known:
        raise ConfigError(f"{_COMMAND_LINE}: {group}={name} is none of {', '.join(known)}{did_you_mean(name, known)}.")
    return name


def _leaves_below(tree: Mapping[Any, Any], prefix: str, where: str) -> list[tuple[str, Value]]:
    found: list[tuple[str, Value]] = []
    for name, value in tree.items():
        key = f"{prefix}.{name}"
        if isinstance(value, dict) and key in sections():
            found.extend(_leaves_below(value, key, where))
        elif key in schema():
            found.append((key, value))
        else:
            raise unknown_key(key, where)
    return found


def _child(section: str) -> str:
    return next(key for key in schema() if key.startswith(section + ".")) + "=VALUE"


def _interpolate(values: Mapping[str, Value], entries: Mapping[str, Entry]) -> dict[str, Value]:
    """Replace ``${train.steps}`` and the like by the value they name."""
    asking = [key for key, entry in entries.items() if "${" in str(entry.value)]
    if not asking:
        return dict(values)
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from .tree import nest

    resolved = dict(values)
    tree = OmegaConf.create(nest({key: _plain(value) for key, value in values.items()}))
    for key in asking:
        try:
            found = OmegaConf.select(tree, key, throw_on_missing=True, throw_on_resolution_failure=True)
        except OmegaConfBaseException:
            raise ConfigError(
                f"{entries[key].where}: {key}={as_text(values[key])} names no key that has a value; write a plain "
                f"value or the dotted name of another key in ${{}}."
            ) from None
        resolved[key] = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    return resolved


def _plain(value: Value) -> Value:
    return list(value) if isinstance(value, tuple) else value


def _materialise(values: dict[str, Value]) -> None:
    """Write out what a null stands for, so that the hash names the schedule that will run."""
    if values["train.schedule.cosine.steps"] is None:
        values["train.schedule.cosine.steps"] = values["train.steps"]
