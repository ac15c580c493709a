"""Strict conversion of one value to the type and bounds of its leaf, and the suggestions of misspelled names."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import cast

from ..errors import ConfigError
from .schema import as_text, schema
from .tree import Leaf, Value


def convert(leaf: Leaf, value: Value, where: str) -> Value:
    """``value`` as ``leaf`` wants it. ``where`` names the file and line or the command line in the message.

    No guessing: a quoted number is a string, a boolean is no integer, 1.0 is no integer; an integer is a number.
    """
    if value is None:
        if leaf.optional:
            return None
        raise _mistyped(leaf, value, where)
    if leaf.kind is tuple:
        return _list(leaf, value, where)
    if leaf.kind is float and type(value) is int:
        value = float(value)
    if type(value) is not leaf.kind:
        raise _mistyped(leaf, value, where)
    if leaf.choices and value not in leaf.choices:
        raise ConfigError(
            f"{where}: {leaf.key} must be {leaf.type_text}, not {as_text(value)!r}{did_you_mean(value, leaf.choices)}."
        )
    if isinstance(value, (int, float)) and leaf.kind is not bool:
        _check_bounds(leaf, value, where)
        return value + 0  # -0.0 and 0.0 are the same setting and must hash alike
    return value


def _check_bounds(leaf: Leaf, value: float, where: str) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{where}: {leaf.key} must be a finite number, not {as_text(value)}.")
    if not leaf.bounds.admits(value):
        raise ConfigError(f"{where}: {leaf.key} must be {leaf.bounds}, not {as_text(value)}.")


def _mistyped(leaf: Leaf, value: Value, where: str) -> ConfigError:
    hint = ""
    if leaf.kind is int and isinstance(value, float) and value.is_integer():
        hint = f"; write {int(value)}"
    elif leaf.kind in (int, float) and isinstance(value, str):
        hint = "; write the number without quotes" if _is_number(value) else ""
    shown = repr(value) if isinstance(value, str) else as_text(value)
    return ConfigError(f"{where}: {leaf.key} must be {leaf.type_text}, not {shown} ({_type_name(value)}){hint}.")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _type_name(value: Value) -> str:
    names = {
        bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list", dict: "a mapping",
        type(None): "empty",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)


def _list(leaf: Leaf, value: Value, where: str) -> tuple[Value, ...]:
    if not isinstance(value, (list, tuple)):
        raise _mistyped(leaf, value, where)
    for index, entry in enumerate(value):
        if type(entry) is not leaf.element:
            wanted = {dict: "a mapping with a name", int: "an integer", str: "a string"}[cast(type, leaf.element)]
            raise ConfigError(f"{where}: {leaf.key}[{index}] must be {wanted}, not {as_text(entry)}.")
    return tuple(dict(entry) if leaf.element is dict else entry for entry in value)


def leaf_of(key: str, where: str) -> Leaf:
    """The leaf ``key``; raises ``ConfigError`` with the nearest match when there is none."""
    table = schema()
    if key in table:
        return table[key]
    raise unknown_key(key, where)


def unknown_key(key: str, where: str) -> ConfigError:
    """The error for a key that the schema lacks, with the nearest one that it has."""
    table = schema()
    last = key.rpartition(".")[2]
    nearest = did_you_mean(key, [*table, *sections()])
    if not nearest:  # a right name under a wrong or missing parent
        homes = [known for known in table if known.rpartition(".")[2] == last]
        nearest = did_you_mean(key, homes, cutoff=0.0)
    way_out = nearest or "; `refractor config show` lists every key"
    return ConfigError(f"{where}: unknown key {key}{way_out}.")


def sections() -> list[str]:
    """Dotted names of all sections, for instance ``train.schedule``."""
    found: dict[str, None] = {}
    for key in schema():
        parts = key.split(".")[:-1]
        found.update(dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts))))
    return list(found)


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``"; did you mean X?"``-style ending of a message, or nothing when no known name is near."""
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f"; did you mean {match[0]}" if match else ""
