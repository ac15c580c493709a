"""Reads a user's YAML file into values by dotted key, each with the line it stands on.

PyYAML follows YAML 1.1, where ``2e-4`` is a string; here it is a number, as everywhere else in a training setup. A key
given twice is an error instead of a silent last-one-wins.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .convert import sections, unknown_key
from .schema import schema
from .tree import Value

if TYPE_CHECKING:
    import yaml

_FLOAT = re.compile(
    r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[0-9][0-9_]*[eE][-+]?[0-9]+
        |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.X,
)


@dataclass(frozen=True)
class Entry:
    """One value of a file and where it stands: ``run.yaml line 12``."""

    value: Value
    where: str


def read_yaml(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Values by dotted key, and the header mapping ``resolved`` that a saved run carries ({} in other files).

    Raises ``ConfigError`` for a missing or unreadable file, a YAML error (with its line), a key given twice, an unknown
    key, and a section that is not a mapping.
    """
    import yaml

    text = _read_text(path)
    try:
        loader = _loader_class()(text)
        root = loader.get_single_node()
        entries: dict[str, Entry] = {}
        header: dict[str, Any] = {}
        for key, node, where in _pairs(root, path, ""):
            if key == "resolved":
                header = loader.construct_object(node, deep=True)
                if not isinstance(header, dict):
                    raise ConfigError(f"{where}: resolved must be the header that a saved run carries.")
            else:
                entries.update(_flatten(loader, key, node, path, where))
        return entries, header
    except yaml.YAMLError as error:
        raise ConfigError(f"{_place(path, error)}: {_reason(error)}.") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give the path of a YAML configuration.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a readable YAML file.") from None


@functools.cache
def _loader_class() -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader that knows ``2e-4`` for a number."""

    _resolve_plain_scalars(Loader)
    return Loader


@functools.cache
def _dumper_class() -> type[yaml.SafeDumper]:
    import yaml

    class Dumper(yaml.SafeDumper):
        """SafeDumper that quotes exactly the strings that ``Loader`` would take for something else."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    _resolve_plain_scalars(Dumper)
    return Dumper


def _resolve_plain_scalars(cls: type[yaml.SafeLoader] | type[yaml.SafeDumper]) -> None:
    """``2e-4`` is a number, a date is a string."""
    resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
        for first, known in cls.yaml_implicit_resolvers.items()
    }
    cls.yaml_implicit_resolvers = resolvers
    cls.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def dump_yaml(tree: dict[str, Any]) -> str:
    """YAML text that ``read_yaml`` reads back to the same values of the same types."""
    import yaml

    return yaml.dump(tree, Dumper=_dumper_class(), sort_keys=False, allow_unicode=True, width=120)


def _pairs(node: Any, path: Path, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Dotted key, value node and place of each entry of a mapping node."""
    import yaml

    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        place = f"{path} line {node.start_mark.line + 1}"
        raise ConfigError(f"{place}: {prefix.rstrip('.') or 'the file'} must be a mapping of keys to values.")
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        where = f"{path} line {line}"
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
            raise ConfigError(
                f"{where}: a key must be a plain name; merge keys and nested keys are not understood here."
            )
        key = prefix + key_node.value
        if key in seen:
            raise ConfigError(f"{where}: {key} stands here for the second time (first in line {seen[key]}); keep one.")
        seen[key] = line
        yield key, value_node, where


def _flatten(loader: Any, key: str, node: Any, path: Path, where: str) -> Iterator[tuple[str, Entry]]:
    if key in schema():
        yield key, Entry(loader.construct_object(node, deep=True), where)
    elif key in sections():
        if node.tag == "tag:yaml.org,2002:null":  # `memory:` with nothing below it sets nothing
            return
        for inner, value, place in _pairs(node, path, key + "."):
            yield from _flatten(loader, inner, value, path, place)
    else:
        raise unknown_key(key, where)


def _place(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f"{path} line {mark.line + 1}" if mark else str(path)


def _reason(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not readable"
    return f"YAML error, {problem}"
