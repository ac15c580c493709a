"""The text of ``masks check``: matrix, marks, groups and ways, compared with the tables they show."""

from __future__ import annotations

import pytest

from refractor_megatron.config.sections import DEFAULT_MASKS
from refractor_megatron.distinction.closure import transitive_closure
from refractor_megatron.distinction.flows import DIRECT, INDIRECT, LEAK, NEVER, describe
from refractor_megatron.distinction.generators import random_rules
from refractor_megatron.distinction.roles import ROLES, SCOPE_BITS
from refractor_megatron.distinction.rules import SCOPES, CompiledRules, compile_rules

SEALED = {"name": "sealed", "when": {"bits": ["SAFETY_SCOPE"]}, "allow_write_to": ["assistant"]}


def cells(text: str) -> dict[str, list[str]]:
    """Marks of each row of the matrix, by its label."""
    rows = {}
    for line in text.splitlines():
        marks = [word for word in line.split() if word in (DIRECT, INDIRECT, NEVER, LEAK)]
        label = line.split("  ")[0].strip()
        if len(marks) >= len(ROLES) and label not in rows:
            rows[label] = marks
    return rows


def test_no_rules() -> None:
    text = describe(compile_rules([]))
    assert "No rules: every earlier token of a segment may be read." in text and "No indirect flows" in text
    assert cells(text) == {role: [DIRECT] * 6 for role in ROLES}


def test_the_default_set() -> None:
    text = describe(compile_rules(DEFAULT_MASKS))
    rows = cells(text)
    assert len(rows) == 12 and rows["user"] == [DIRECT] * 3 + [INDIRECT] + [DIRECT] * 2 + [NEVER] * 6
    assert rows["tool +SAFETY_SCOPE"] == ([DIRECT] * 4 + [INDIRECT] * 2) * 2
    assert "  tool -> assistant -> system, user, code, data plain or +SAFETY_SCOPE" in text
    assert "safety_restricted  any role +SAFETY_SCOPE  anyone " in text and "its scope only" in text
    assert compile_rules(DEFAULT_MASKS).digest in text


def test_a_refused_set_shows_where_it_leaks() -> None:
    text = describe(compile_rules([SEALED]))
    assert cells(text)["user"][6:] == [LEAK] * 6 and cells(text)["assistant"][6:] == [DIRECT] * 6
    leaks = text.split("Leaks past SAFETY_SCOPE")[1]
    assert "every role +SAFETY_SCOPE -> assistant -> system, user, tool, code, data" in leaks
    assert "Indirect flows" not in text, "a leak is not listed among the harmless ones"
    assert "though a rule on SAFETY_SCOPE forbids it" in text


def test_combinations_of_bits_come_with_all() -> None:
    rules = compile_rules([*DEFAULT_MASKS, {"name": "r", "when": {"bits": ["RET_SCOPE"]}, "allow_write_to": []}])
    assert "1 more combination of scope bits was judged too; --all shows them" in describe(rules)
    assert len(cells(describe(rules))) == 18 and len(cells(describe(rules, every_scope=True))) == 24
    assert "user +SAFETY_SCOPE+RET_SCOPE" in describe(rules, every_scope=True)


@pytest.mark.parametrize("seed", range(30))
def test_every_mark_is_the_table_s(seed: int) -> None:
    import numpy as np

    rules = compile_rules(random_rules(np.random.default_rng(seed)))
    closure = transitive_closure(rules.table)
    shown = cells(describe(rules, every_scope=True))
    assert len(shown) >= len(ROLES) and {label.split()[0] for label in shown} == set(ROLES)
    scopes = sorted({_scope(label) for label in shown}, key=lambda scope: (scope.bit_count(), scope))
    for label, marks in shown.items():
        query = ROLES.index(label.split()[0]) * SCOPES + _scope(label)
        keys = [role * SCOPES + scope for scope in scopes for role in range(len(ROLES))]
        assert marks == [_mark(rules, closure, query, key) for key in keys]


def test_all_indirect_flows_are_listed_and_no_other() -> None:
    """Every pair that the matrix marks as indirect ends some line that begins with its source."""
    text = describe(compile_rules(DEFAULT_MASKS))
    lines = [line.strip() for line in text.split("Indirect flows")[1].splitlines()[1:]]
    assert len(lines) == 4 and all(line.count(" -> ") == 2 for line in lines)
    assert lines[1] == "code, data -> system -> tool plain or +SAFETY_SCOPE"


def test_no_shared_roles_are_said_to_be_none() -> None:
    assert "shared  none (a segment reads nothing of another one)" in describe(compile_rules([], shared_roles=()))


def test_abbreviations_tell_roles_apart() -> None:
    rules = compile_rules([], roles=(*ROLES, "critic", "coder"))
    assert "s u a t code d cr coder" in describe(rules)


def _scope(label: str) -> int:
    return sum(1 << i for i, bit in enumerate(SCOPE_BITS) if f"+{bit.name}" in label)


def _mark(rules: CompiledRules, closure: object, query: int, key: int) -> str:
    if rules.table[query, key]:
        return DIRECT
    if not closure[query, key]:  # type: ignore[index]
        return NEVER
    return LEAK if rules.safety_forbidden[query, key] else INDIRECT
