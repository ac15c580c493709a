"""A tree of frozen dataclasses whose leaves describe themselves and remember whether anybody read them.

A *leaf* is one configuration key. Its type is the dataclass annotation; everything else a person may ask about it
(meaning, unit, bounds, where the specification defines it, whether a resumed run may change it) is field metadata, so
checks, ``config explain`` and the documentation all come from one place.

Reading is tracked without a price on the hot path: in a tracked tree the values start outside the instance
dictionary, so the first read of a leaf falls through to ``Section.__getattr__``, which records the key and then plants
the value; every later read is a plain attribute access.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

#: Anything a leaf may hold.
Value = Any
S = TypeVar("S", bound="Section")
#: ``fixed``: a checkpoint can only be resumed with the same value. ``free``: it may differ.
Resume = Literal["fixed", "free"]

_ELEMENTS: Mapping[type | None, str] = {dict: "mask rules", int: "integers", str: "strings"}
_META = "refractor_leaf"
_HIDDEN = "_hidden"
_PREFIX = "_prefix"
_READS = "_reads"


@dataclass(frozen=True)
class Bounds:
    """Interval in which a value makes sense at all; a value outside is always an error (unlike section-16 limits)."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def admits(self, value: float) -> bool:
        """True when ``value`` lies inside."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        parts = ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in parts if bound is not None)


@dataclass(frozen=True)
class Leaf:
    """One configuration key and all that is known about it."""

    key: str
    attribute: str
    kind: type
    element: type | None  # of a list's entries
    optional: bool
    choices: tuple[str, ...]
    default: Value
    meaning: str
    unit: str
    section: str
    bounds: Bounds
    limit: tuple[float, float] | None
    resume: Resume
    reserved: bool
    reader: str

    @property
    def readers(self) -> tuple[str, ...]:
        """Modules of the package that read the key."""
        return tuple(self.reader.split(", ")) if self.reader else ()

    @property
    def only_checked(self) -> bool:
        """True for a key whose whole effect is a check of the configuration itself."""
        return self.reader == "config"

    @property
    def type_text(self) -> str:
        """The type in words, for messages and ``config explain``."""
        if self.choices:
            text = "one of " + ", ".join(self.choices)
        else:
            text = {
                int: "an integer",
                float: "a number",
                bool: "true or false",
                str: "a string",
                tuple: f"a list of {_ELEMENTS.get(self.element, '')}",
            }[self.kind]
        return f"{text}, or null" if self.optional else text


def leaf(
    default: Value,
    meaning: str,
    *,
    reader: str = "",
    unit: str = "",
    section: str = "12.1",
    bounds: Bounds | None = None,
    limit: tuple[float, float] | None = None,
    resume: Resume = "fixed",
    reserved: bool = False,
) -> Any:
    """Declare one key of a section.

    ``section`` is the section of the specification that defines the key ("own" for keys of this implementation),
    ``limit`` its section-16 range, ``reader`` the modules that read it, ``reserved`` marks keys that are
    accepted so that the specification's YAML loads as it stands, though this version has no reader for them.
    """
    assert reserved != bool(reader), f"a key is either reserved or names its reader: {meaning}"
    described = {
        "meaning": meaning,
        "unit": unit,
        "section": section,
        "bounds": bounds or Bounds(),
        "limit": limit,
        "resume": resume,
        "reserved": reserved,
        "reader": reader,
    }
    # A factory, not a default: a default would stay behind as a class attribute and hide the first read.
    return field(default_factory=lambda: default, metadata={_META: described})


def branch(section: type[Section]) -> Any:
    """Declare a nested section with its own defaults."""
    return field(default_factory=section)


class Section:
    """Base of every section: compares and prints by value, and tracks reads once ``track`` has been called."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and dict(values_of(self)) == dict(values_of(other))

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        inner = ", ".join(f"{key}={value!r}" for key, value in values_of(self))
        return f"{type(self).__name__}({inner})"

    if not TYPE_CHECKING:  # a visible __getattr__ would make every misspelled key pass the type checker

        def __getattr__(self, name: str) -> Value:
            hidden = self.__dict__.get(_HIDDEN)
            if hidden is None or name not in hidden:
                raise AttributeError(f"{type(self).__name__} has no key {name!r}")
            self.__dict__[_READS].add(self.__dict__[_PREFIX] + yaml_name(name))
            value = self.__dict__[name] = hidden[name]
            return value


def yaml_name(attribute: str) -> str:
    """YAML name of an attribute: Python keywords (``global``, ``lambda``) carry a trailing underscore here only."""
    return attribute.rstrip("_")


def leaves(root: type[Section], prefix: str = "") -> Mapping[str, Leaf]:
    """All leaves below ``root`` by dotted YAML key, in the order of the schema."""
    found: dict[str, Leaf] = {}
    hints = typing.get_type_hints(root)
    for item in fields(root):  # type: ignore[arg-type]  # every Section subclass is a dataclass
        key = prefix + yaml_name(item.name)
        hint = hints[item.name]
        if isinstance(hint, type) and issubclass(hint, Section):
            found.update(leaves(hint, key + "."))
            continue
        kind, element, optional, choices = _read_hint(hint)
        default = cast(Callable[[], Value], item.default_factory)()
        found[key] = Leaf(key, item.name, kind, element, optional, choices, default, **item.metadata[_META])
    return types.MappingProxyType(found)


def _read_hint(hint: Any) -> tuple[type, type | None, bool, tuple[str, ...]]:
    """-> (kind, kind of a list's entries, optional, choices)."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        kind, element, _, choices = _read_hint(inner)
        return kind, element, True, choices
    origin = typing.get_origin(hint)
    if origin is Literal:
        return str, None, False, arguments
    if origin is tuple:
        return tuple, typing.get_origin(arguments[0]) or arguments[0], False, ()
    return hint, None, False, ()


def values_of(section: Section, prefix: str = "") -> Iterator[tuple[str, Value]]:
    """Dotted key and value of every leaf below ``section``, without counting as a read."""
    hidden = section.__dict__.get(_HIDDEN, {})
    for item in fields(section):  # type: ignore[arg-type]  # every Section subclass is a dataclass
        value = hidden[item.name] if item.name in hidden else section.__dict__[item.name]
        key = prefix + yaml_name(item.name)
        if isinstance(value, Section):
            yield from values_of(value, key + ".")
        else:
            yield key, value


def build(root: type[S], values: Mapping[str, Value], prefix: str = "") -> S:
    """Make a section from values by dotted key; every leaf must be there."""
    hints = typing.get_type_hints(root)
    arguments = {}
    for item in fields(root):  # type: ignore[arg-type]  # every Section subclass is a dataclass
        key = prefix + yaml_name(item.name)
        hint = hints[item.name]
        nested = isinstance(hint, type) and issubclass(hint, Section)
        arguments[item.name] = build(hint, values, key + ".") if nested else values[key]
    return root(**arguments)


def track(section: Section, reads: set[str], prefix: str = "") -> None:
    """From now on, record in ``reads`` the dotted key of every leaf that is read below ``section``."""
    instance = section.__dict__
    hidden = {}
    for item in fields(section):  # type: ignore[arg-type]  # every Section subclass is a dataclass
        value = instance[item.name]
        if isinstance(value, Section):
            track(value, reads, prefix + yaml_name(item.name) + ".")
        else:
            hidden[item.name] = instance.pop(item.name)
    instance.update({_HIDDEN: hidden, _READS: reads, _PREFIX: prefix})


def nest(values: Mapping[str, Value]) -> dict[str, Value]:
    """Nested mapping with YAML names from values by dotted key."""
    tree: dict[str, Value] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
