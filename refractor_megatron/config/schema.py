"""The root of the configuration tree: one frozen, hashed value that describes a whole run."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from . import sections as s
from .tree import Leaf, Section, Value, branch, build, leaf, leaves, nest, track, values_of


@dataclass(frozen=True, eq=False, repr=False)
class RunConfig(Section):
    """A whole run: frozen, hashed, and aware of which of its keys were read.

    ``refractor_megatron.config.compose`` and ``RunConfig.load`` make one. Made directly from its sections it is good
    for tests: then it tracks no reads and takes every value for the preset's own.
    """

    limits: Literal["enforce", "warn"] = leaf(
        "enforce", "Values outside the ranges of section 16 are errors, or only warnings", section="16", resume="free",
        reader="config",
    )  # fmt: skip
    model: s.Model = branch(s.Model)
    relation: s.Relation = branch(s.Relation)
    memory: s.Memory = branch(s.Memory)
    router: s.Router = branch(s.Router)
    safety: s.Safety = branch(s.Safety)
    train: s.Train = branch(s.Train)
    data: s.Data = branch(s.Data)
    parallel: s.Parallel = branch(s.Parallel)
    checkpoint: s.Checkpoint = branch(s.Checkpoint)
    evaluation: s.Evaluation = branch(s.Evaluation)
    telemetry: s.Telemetry = branch(s.Telemetry)

    def __post_init__(self) -> None:
        self.__dict__.update(_preset="", _baseline={}, _reads_seen=set())

    @classmethod
    def from_values(cls, values: Mapping[str, Value], *, preset: str, baseline: Mapping[str, Value]) -> RunConfig:
        """A tracked configuration.

        ``values`` holds every leaf by dotted key. ``baseline`` holds, for each key that the user set by file or
        command line, the value that the preset has there.
        """
        cfg = build(cls, values)
        cfg.__dict__.update(_preset=preset, _baseline=dict(baseline))
        track(cfg, cfg.__dict__["_reads_seen"])
        return cfg

    @property
    def preset(self) -> str:
        """Name of the experiment this run was composed from."""
        return str(self.__dict__["_preset"])

    @property
    def baseline(self) -> Mapping[str, Value]:
        """The preset's value of each explicit key."""
        return dict(self.__dict__["_baseline"])

    @property
    def explicit(self) -> frozenset[str]:
        """Dotted keys that the user set by file or on the command line."""
        return frozenset(self.__dict__["_baseline"])

    @property
    def hash(self) -> str:
        """Identity of the run: 16 hexadecimal digits over every leaf."""
        return digest(self.values())

    @property
    def fixed_hash(self) -> str:
        """Identity of what a checkpoint depends on: 16 hexadecimal digits over the leaves that a resume must keep."""
        table = schema()
        return digest({key: value for key, value in self.values().items() if table[key].resume == "fixed"})

    def values(self) -> dict[str, Value]:
        """Every leaf by dotted YAML key, in schema order. Does not count as reading."""
        return {key: copy.deepcopy(value) for key, value in values_of(self)}

    def to_dict(self) -> dict[str, Any]:
        """Nested plain mappings and lists with YAML names. Does not count as reading."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in self.values().items()}
        return nest(plain)

    def read_keys(self) -> set[str]:
        """Dotted keys that were read since the configuration was composed or loaded."""
        return set(self.__dict__["_reads_seen"])

    def unread_explicit(self, read: set[str] | None = None) -> list[str]:
        """Keys that the user set to another value than the preset's and that nothing read, in schema order.

        ``read`` defaults to what was read in this process; with several ranks pass the union over them.
        """
        seen = self.read_keys() if read is None else read
        baseline = self.__dict__["_baseline"]
        changed = [key for key, value in values_of(self) if key in baseline and baseline[key] != value]
        return [key for key in changed if key not in seen and not schema()[key].only_checked]

    def require_all_read(self, read: set[str] | None = None) -> None:
        """Raises ``ConfigError`` naming every key that the user changed and that had no effect on this run."""
        unread = self.unread_explicit(read)
        if not unread:
            return
        values = dict(values_of(self))
        have, them = ("has", "it") if len(unread) == 1 else ("have", "them")
        named = ", ".join(f"{key}={as_text(values[key])}" for key in unread)
        raise ConfigError(
            f"{named} {have} no effect on this run: nothing reads {them} with the other settings of preset "
            f"{self.preset}; remove {them}, or see `refractor config explain {unread[0]}`."
        )

    def save(self, path: Path) -> None:
        """Write the resolved configuration with its hashes. Raises ``OutputError`` when the disk refuses."""
        from .resolved import write

        write(self, path)

    @classmethod
    def load(cls, path: Path) -> RunConfig:
        """Read what ``save`` wrote. Raises ``ConfigError`` when the file is missing, damaged or edited by hand."""
        from .resolved import read

        return read(path)


@functools.cache
def schema() -> Mapping[str, Leaf]:
    """Every leaf of ``RunConfig`` by dotted YAML key."""
    return leaves(RunConfig)


def defaults() -> dict[str, Value]:
    """The ``reference`` value of every leaf by dotted key."""
    return {key: copy.deepcopy(one.default) for key, one in schema().items()}


def digest(values: Mapping[str, Value]) -> str:
    """16 hexadecimal digits of the SHA-256 of the values as canonical JSON: sorted keys, no spaces."""
    text = json.dumps(dict(values), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def brief(value: Value) -> str:
    """``as_text``, with a list of mask rules shortened to the rules' names and a digest of their content."""
    if not isinstance(value, tuple) or not all(isinstance(rule, dict) for rule in value) or not value:
        return as_text(value)
    names = ", ".join(str(rule.get("name")) for rule in value)
    return f"{names} (#{digest({'rules': list(value)})[:6]})"


def as_text(value: Value) -> str:
    """A value the way YAML spells it, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (tuple, list, dict)):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
