"""Where two configurations differ, for ``refractor config diff``."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from .convert import did_you_mean
from .resolve import PRESET_GROUP, compose, presets
from .schema import RunConfig, brief, schema


def diff(a: str, b: str) -> str:
    """A table with one line for each key that differs; ``a`` and ``b`` as ``configuration`` takes them."""
    first, second = configuration(a), configuration(b)
    left, right = first.values(), second.values()
    rows = [("key", a, b, "on resume")]
    rows += [
        (key, brief(left[key]), brief(right[key]), leaf.resume)
        for key, leaf in schema().items()
        if left[key] != right[key]
    ]
    if len(rows) == 1:
        return f"{a} and {b} are the same configuration ({first.hash})."
    rows.append(("(hash)", first.hash, second.hash, ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, _verdict(first, second)])


def _verdict(first: RunConfig, second: RunConfig) -> str:
    if first.fixed_hash == second.fixed_hash:
        return "Only free keys differ: a checkpoint of one can be resumed with the other."
    return "Fixed keys differ: a checkpoint of one cannot be resumed with the other."


def configuration(name: str) -> RunConfig:
    """The configuration that ``name`` stands for.

    A preset's name, a run folder (its config.yaml), a resolved configuration or a user's YAML file (over the reference
    preset). Write ./NAME for a folder that is called like a preset. Raises ``ConfigError`` when it is none of these.
    """
    if name in presets():
        return compose([f"{PRESET_GROUP}={name}"])
    path = Path(name)
    if path.is_dir():
        return RunConfig.load(path / "config.yaml")
    if path.is_file():
        return compose(file=path)
    known = presets()
    raise ConfigError(
        f"{name}: neither a preset ({', '.join(known)}) nor a run folder nor a YAML file{did_you_mean(name, known)}."
    )
