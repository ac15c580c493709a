"""A file of mask rules: YAML with the place of every value, so that each mistake names file, line and column.

The file is a list of rules (the value of ``safety.masks``), or a mapping ``{roles, shared_roles, rules}``: ``roles``
are appended to the standard ones, ``shared_roles`` replace ``[system]``. Or it is a configuration, of which
``safety.masks`` is read and nothing else. What a rule may say is judged by ``rules``
alone; this module reads the file and turns the path of a ``RuleError`` into a place. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refractor_megatron.distinction.closure import Flow, LeakError, check_closure
from refractor_megatron.distinction.contradictions import contradictions
from refractor_megatron.distinction.roles import ROLES
from refractor_megatron.distinction.rules import (
    SHARED_ROLES,
    CompiledRules,
    RuleError,
    RulePath,
    compile_rules,
    nearest,
)
from refractor_megatron.errors import ConfigError

if TYPE_CHECKING:
    import yaml

_FIELDS = ("roles", "shared_roles", "rules")
_ROLE_NAME = re.compile(r"[a-z][a-z0-9_]*")
#: Roles are stored as uint8.
_MOST_ROLES = 256
#: Values of a file, aliases written out: bounds what a few lines of aliases of aliases can unfold to.
_MOST_VALUES = 100_000
_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


@dataclass(frozen=True)
class RuleFile:
    """A compiled rules file and the places of its values."""

    compiled: CompiledRules
    _tree: _Tree
    _base: RulePath

    def check(self) -> list[Flow]:
        """Indirect flows that do no harm.

        Errors: ``ConfigError`` naming file, line and column of the rule that SAFETY_SCOPE leaks past.
        """
        try:
            return check_closure(self.compiled)
        except LeakError as error:
            raise ConfigError(f"{self._place(error.rules[0])}: the rule set {error.complaint}") from None

    def _place(self, rule: str, *path: int | str) -> str:
        """file:line:column of a rule, or of a value in it."""
        raw = self._tree.at(self._base)
        index = next(i for i, one in enumerate(raw) if one["name"] == rule)
        return self._tree.place((*self._base, index, *path))


def read_rules(path: Path) -> RuleFile:
    """Reads, validates and compiles a rules file; leaks through several layers are found by ``RuleFile.check``.

    Errors: ``ConfigError``, one sentence with ``file:line:column``, for an unreadable file, YAML that does not parse, a
    key given twice, an unknown field, a value of the wrong type, an unknown role or scope bit (with the nearest match),
    two rules of one name, and rules that contradict each other.
    """
    tree = _Tree.read(path)
    base: RulePath = ()
    roles, shared = ROLES, SHARED_ROLES
    if isinstance(tree.data, dict) and "safety" in tree.data:
        base = tree.configured_rules()
    elif isinstance(tree.data, dict):
        base = ("rules",)
        tree.known_fields()
        roles = _extended_roles(tree)
        shared = _shared_roles(tree, roles)
    elif not isinstance(tree.data, list):
        raise tree.error(
            (), f"a rules file is a list of rules, a mapping with {', '.join(_FIELDS)}, or a configuration."
        )
    try:
        file = RuleFile(compile_rules(tree.at(base), roles, shared), tree, base)
    except RuleError as error:
        raise tree.error((*base, *error.path), f"{_subject(error, base)} {error.complaint}", error.of_key) from None
    for found in contradictions(file.compiled):
        raise ConfigError(f"{file._place(found.rule, *found.path)}: {found.sentence}")
    return file


def _subject(error: RuleError, base: RulePath) -> str:
    if error.rule is not None:
        return f"rule {error.rule!r}"
    return f"rule {int(error.path[0]) + 1}" if error.path else f"the value of {'.'.join(map(str, base)) or 'rules'}"


def _extended_roles(tree: _Tree) -> tuple[str, ...]:
    """The standard roles with those of the file behind them."""
    roles = list(ROLES)
    for i, name in enumerate(_names(tree, "roles")):
        if name in roles:
            told = "is a standard role" if name in ROLES else "is listed twice"
            raise tree.error(("roles", i), f"role {name!r} {told}; list only the new roles, each once.")
        if not _ROLE_NAME.fullmatch(name):
            raise tree.error(
                ("roles", i), f"role {name!r} must be lower-case letters, digits and _, beginning with a letter."
            )
        roles.append(name)
    if len(roles) > _MOST_ROLES:
        raise tree.error(("roles",), f"{len(roles)} roles do not fit into uint8; at most {_MOST_ROLES} are possible.")
    return tuple(roles)


def _shared_roles(tree: _Tree, roles: tuple[str, ...]) -> tuple[str, ...]:
    if "shared_roles" not in tree.data:
        return SHARED_ROLES
    names = _names(tree, "shared_roles")
    for i, name in enumerate(names):
        if name not in roles:
            raise tree.error(("shared_roles", i), f"shared_roles names an unknown role {name!r}{nearest(name, roles)}.")
    return tuple(names)


def _names(tree: _Tree, field: str) -> list[str]:
    names = tree.data.get(field, [])
    if not isinstance(names, list):
        raise tree.error((field,), f"{field} must be a list of role names, not {names!r}.")
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise tree.error((field, i), f"{field} must be a list of role names, but holds {name!r}.")
    return names


class _Tree:
    """Plain data of one YAML document, with line and column (from 1) of every key and value by path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: Any = None
        self._values: dict[RulePath, yaml.Mark] = {}
        self._keys: dict[RulePath, yaml.Mark] = {}

    @classmethod
    def read(cls, path: Path) -> _Tree:
        import yaml

        tree = cls(path)
        text = tree._text()
        with tree._yaml_errors(text):
            loader = yaml.SafeLoader(text)
            root = loader.get_single_node()
            if root is None:
                raise ConfigError(f"{path}:1:1: the file holds no rules; write [] if none are meant.")
            tree.data = tree._plain(loader, root, (), ())
        return tree

    def at(self, path: RulePath) -> Any:
        """The value at a path."""
        value = self.data
        for step in path:
            value = value[step]
        return value

    def place(self, path: RulePath, of_key: bool = False) -> str:
        """file:line:column of the value at ``path`` (or its key); of the nearest thing around it where it is absent."""
        mark = (self._keys if of_key else self._values).get(path)
        while mark is None:
            mark = self._values.get(path)
            path = path[:-1]
        return self._position(mark.line, mark.column)

    def error(self, path: RulePath, sentence: str, of_key: bool = False) -> ConfigError:
        return ConfigError(f"{self.place(path, of_key)}: {sentence}")

    def configured_rules(self) -> RulePath:
        """The way to ``safety.masks`` of a configuration."""
        path: RulePath = ("safety", "masks")
        if not isinstance(self.data["safety"], dict) or "masks" not in self.data["safety"]:
            raise self.error(
                path[:1], "the configuration sets no safety.masks, so its preset's rules hold; check --preset NAME."
            )
        return path

    def known_fields(self) -> None:
        for field in self.data:
            if field not in _FIELDS:
                hint = nearest(field, _FIELDS)
                raise self.error((field,), f"a rules file has no field {field!r}{hint}.", of_key=True)
        if "rules" not in self.data:
            raise self.error((), "the mapping has no field 'rules'; give the list of rules, [] if none are meant.")

    def _position(self, line: int, column: int) -> str:
        return f"{self.path}:{line + 1}:{column + 1}"

    def _plain(self, loader: yaml.SafeLoader, node: yaml.Node, path: RulePath, around: tuple[int, ...]) -> Any:
        """Values below ``node``; ``around`` holds the nodes that it stands in, which an alias may not name."""
        import yaml

        self._values[path] = node.start_mark
        if len(self._values) > _MOST_VALUES:
            raise self.error(
                path, f"the file holds more than {_MOST_VALUES:,} values, aliases written out; shorten it."
            )
        if isinstance(node, yaml.ScalarNode):
            return loader.construct_object(node)
        if node.tag not in _PLAIN_TAGS:
            raise self.error(path, f"the tag {node.tag} is not understood in rules; write a plain list or mapping.")
        if id(node) in around:
            raise self.error(path, "the alias names a value that it stands in; write the value out.")
        around = (*around, id(node))
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(loader, item, (*path, i), around) for i, item in enumerate(node.value)]
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            values[key] = self._plain(loader, value_node, (*path, key), around)
        return values

    def _key(self, node: yaml.Node, path: RulePath) -> str:
        """A field's name, noted with its place; refuses what is no plain name and what stands there already."""
        import yaml

        here = self._position(node.start_mark.line, node.start_mark.column)
        if not isinstance(node, yaml.ScalarNode) or node.tag == "tag:yaml.org,2002:merge":
            raise ConfigError(f"{here}: a field must be a plain name; merge keys and nested keys are not understood.")
        key = str(node.value)
        if (first := self._keys.get((*path, key))) is not None:
            raise ConfigError(
                f"{here}: field {key!r} stands here for the second time (first in line {first.line + 1}); keep one."
            )
        self._keys[(*path, key)] = node.start_mark
        return key

    def _text(self) -> str:
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            raise ConfigError(f"{self.path}: there is no such file; give the path of a YAML file of rules.") from None
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read ({error.strerror}); give a readable YAML file.") from None
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            line_start = raw.rfind(b"\n", 0, error.start) + 1
            here = self._position(raw.count(b"\n", 0, error.start), error.start - line_start)
            raise ConfigError(f"{here}: this byte is not UTF-8; save the file as UTF-8 text.") from None

    @contextmanager
    def _yaml_errors(self, text: str) -> Iterator[None]:
        import yaml

        try:
            yield
        except RecursionError:
            raise ConfigError(f"{self.path}: values are nested too deeply; a rules file needs five levels.") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            assert mark is not None, error
            here = self._position(mark.line, mark.column)
            reason = ", ".join(part for part in (error.context, error.problem) if part)
            raise ConfigError(f"{here}: YAML error, {reason}; correct the syntax.") from None
        except yaml.reader.ReaderError as error:
            before = text[: error.position]
            here = self._position(before.count("\n"), error.position - before.rfind("\n") - 1)
            raise ConfigError(f"{here}: YAML error, {error.reason}; remove the character.") from None
