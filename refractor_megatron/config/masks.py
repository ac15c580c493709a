"""First look at the rules in ``safety.masks``: fields, roles, causality. The mask compiler judges all the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .convert import did_you_mean

#: Mirrors ``distinction.roles.ROLES``, which lies one floor above this package; a test keeps the two equal.
ROLE_NAMES = ("system", "user", "assistant", "tool", "code", "data")
RULE_FIELDS = ("name", "when", "allow_read_from", "allow_write_to", "causal")


def mask_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each rule that is not of the shape of section 3, or that next-token training cannot use."""
    for index, rule in enumerate(values["safety.masks"]):
        name = rule.get("name")
        if not isinstance(name, str) or not name:
            yield f"safety.masks[{index}] has no name: give every rule a name of its own"
            continue
        where = f"safety.masks rule {name}"
        for field in rule:
            if field not in RULE_FIELDS:
                yield f"{where} has an unknown field {field}{_nearest(field, RULE_FIELDS)}"
        for field, role in _roles(rule):
            if role not in ROLE_NAMES:
                yield f"{where} names an unknown role {role} in {field}{_nearest(role, ROLE_NAMES)}"
        if rule.get("causal") is False:
            yield f"{where} is not causal, so in next-token training a token would read its own label: set causal: true"


def _roles(rule: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    when = rule.get("when")
    if isinstance(when, Mapping) and "role" in when:
        yield "when", when["role"]
    for field in ("allow_read_from", "allow_write_to"):
        named = rule.get(field)
        for role in named if isinstance(named, list) else ():
            yield field, role


def _nearest(name: object, known: tuple[str, ...]) -> str:
    return did_you_mean(name, known) or f": known are {', '.join(known)}"
