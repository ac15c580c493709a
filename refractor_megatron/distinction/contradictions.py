"""Rules that contradict each other: one grants what another always takes away.

Lists restrict, so the union of rules is always computable; but a grant that no arrangement of tokens can ever use is a
mistake of whoever wrote it, and training with it would silently follow only one of the two rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from refractor_megatron.distinction.rules import SCOPES, BoolTable, CompiledRules, Rule, rule_table
from refractor_megatron.errors import ConfigError


@dataclass(frozen=True)
class Contradiction:
    """A sentence about two rules or more; ``path`` leads from ``rule`` to the value that stands against the others."""

    rule: str
    path: tuple[int | str, ...]
    sentence: str


def contradictions(rules: CompiledRules) -> Iterator[Contradiction]:
    """Contradictions in the order of the rules' names.

    Two kinds: rules with the same ``when`` of which one is causal and the other is not; and a role in a rule's list
    that no token the rule matches can read (or be read by), because of other rules.
    """
    for first, second in combinations(rules.rules, 2):
        if (first.role, first.bits) == (second.role, second.bits) and first.causal != second.causal:
            yield Contradiction(
                second.name,
                ("causal",),
                f"rules {first.name!r} and {second.name!r} match the same tokens, but one is causal and the other is "
                f"not; give both the same causal.",
            )
    for rule in rules.rules:
        yield from _dead_grants(rules, rule)


def check_contradictions(rules: CompiledRules) -> None:
    """Raises ``ConfigError`` with the first contradiction."""
    for found in contradictions(rules):
        raise ConfigError(f"safety.masks: {found.sentence}")


def _dead_grants(rules: CompiledRules, rule: Rule) -> Iterator[Contradiction]:
    matched = rule_table(rule, rules.roles)[1].diagonal()
    role_of = np.arange(rules.types) // SCOPES
    for field, verb in (("allow_read_from", "read from"), ("allow_write_to", "write to")):
        for role in getattr(rule, field) or ():
            named = role_of == rules.roles.index(role)
            edges = np.outer(matched, named) if field == "allow_read_from" else np.outer(named, matched)
            if (rules.table & edges).any():
                continue
            others = [other.name for other in rules.rules if other is not rule and _forbids(other, rules, edges)]
            yield Contradiction(
                rule.name,
                (field,),
                f"rule {rule.name!r} lets its tokens {verb} {role}, but {_named(others)} every such edge; remove "
                f"{role} from {field} of {rule.name!r} or allow it there too.",
            )


def _forbids(rule: Rule, rules: CompiledRules, edges: BoolTable) -> bool:
    """Whether the rule alone takes away some of the edges."""
    return bool((edges & ~rule_table(rule, rules.roles)[0]).any())


def _named(names: list[str]) -> str:
    quoted = [repr(name) for name in names]
    if len(quoted) == 1:
        return f"rule {quoted[0]} forbids"
    return f"rules {', '.join(quoted[:-1])} and {quoted[-1]} forbid"
