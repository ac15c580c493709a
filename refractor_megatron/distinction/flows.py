"""A rule set as text that a person can read: the rules, who reads whom, and what flows over several layers.

48 types are too many to print one by one: the matrix has a block of role x role for each scope that a rule names, and
ways of information are listed for groups of types that behave alike. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refractor_megatron.distinction.closure import Flow, indirect_flows, transitive_closure
from refractor_megatron.distinction.roles import SCOPE_BITS
from refractor_megatron.distinction.rules import SCOPES, CompiledRules, Rule, type_name

#: Marks of a cell: directly, only over several layers, never, and a flow that SAFETY_SCOPE forbids.
DIRECT, INDIRECT, NEVER, LEAK = "●", "○", "·", "✗"
#: ``str.translate`` table for terminals that cannot show them.
ASCII_MARKS = str.maketrans({DIRECT: "x", INDIRECT: "o", NEVER: ".", LEAK: "!"})


def describe(rules: CompiledRules, every_scope: bool = False) -> str:
    """Digest, roles, rules, matrix of flows and the ways of indirect ones, of a refused set too; several lines.

    every_scope: all combinations of the scope bits that rules name, not only those that a rule names together.
    """
    view = _View(rules, every_scope)
    return "\n\n".join(
        [
            f"digest  {rules.digest}\n{_roles(rules)}",
            _rule_table(rules.rules),
            f"Who reads whom: a reader's row marks the columns that it reads\n\n{view.matrix()}",
            view.flow_lines(),
        ]
    )


def _roles(rules: CompiledRules) -> str:
    shared = f"{', '.join(rules.shared_roles)} (readable from every segment of a document)"
    if not rules.shared_roles:
        shared = "none (a segment reads nothing of another one)"
    return f"roles   {', '.join(rules.roles)}\nshared  {shared}"


def _rule_table(rules: Sequence[Rule]) -> str:
    if not rules:
        return "No rules: every earlier token of a segment may be read."
    head = ("rule", "tokens", "may read", "may be read by", "order")
    rows = [
        (
            rule.name,
            " ".join(filter(None, [rule.role or "any role", *(f"+{bit}" for bit in rule.bits)])),
            _listed(rule.allow_read_from, rule.bits),
            _listed(rule.allow_write_to, rule.bits),
            "causal" if rule.causal else "both ways",
        )
        for rule in rules
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows))


def _listed(roles: tuple[str, ...] | None, bits: tuple[str, ...]) -> str:
    if roles is None:
        return "anyone"
    named = ", ".join(roles)
    return (f"{named}, its scope" if named else "its scope only") if bits else (named or "nobody")


class _View:
    """The types of a rule set that are shown: every role with every shown scope (a set of scope bits, as an index)."""

    def __init__(self, rules: CompiledRules, every_scope: bool) -> None:
        self.rules = rules
        masks = [_mask(rule.bits) for rule in rules.rules]
        named = sum(1 << i for i in range(len(SCOPE_BITS)) if any(mask >> i & 1 for mask in masks))
        subsets = [scope for scope in range(SCOPES) if scope & ~named == 0]
        shown = subsets if every_scope else {0, *masks}
        self.scopes = sorted(shown, key=lambda scope: (scope.bit_count(), scope))
        #: Scopes that exist but are not shown.
        self.left_out = len(subsets) - len(self.scopes)
        self.closure = transitive_closure(rules.table)
        self.leaks = self.closure & rules.safety_forbidden
        self.groups = self._behaviours()

    def mark(self, query: int, key: int) -> str:
        """How information comes from one type to another."""
        if self.rules.table[query, key]:
            return DIRECT
        if self.leaks[query, key]:
            return LEAK
        return INDIRECT if self.closure[query, key] else NEVER

    def matrix(self) -> str:
        """Readers in rows, what they read in columns, in a block for each pair of scopes."""
        roles = self.rules.roles
        short = _abbreviations(roles)
        block = max(sum(map(len, short)) + len(short) - 1, *(len(_scope_name(scope)) for scope in self.scopes))
        rows: list[tuple[str, list[str]]] = [
            ("", [_scope_name(scope) for scope in self.scopes]),
            ("", [" ".join(short)] * len(self.scopes)),
        ]
        for q_scope in self.scopes:
            for q, role in enumerate(roles):
                cells = [
                    " ".join(
                        self.mark(q * SCOPES + q_scope, k * SCOPES + k_scope).ljust(len(name))
                        for k, name in enumerate(short)
                    )
                    for k_scope in self.scopes
                ]
                rows.append((f"{role} {_scope_name(q_scope) if q_scope else ''}".rstrip(), cells))
        width = max(len(name) for name, _ in rows)
        lines = [
            "   ".join([name.ljust(width), *(cell.ljust(block) for cell in cells)]).rstrip() for name, cells in rows
        ]
        legend = f"{DIRECT} reads directly   {INDIRECT} only through other tokens, over several layers   {NEVER} never"
        legend += " (but a token always reads itself)"
        if self.leaks.any():
            legend += f"\n{LEAK} over several layers, though a rule on SAFETY_SCOPE forbids it"
        if self.left_out:
            more = "combinations of scope bits were" if self.left_out > 1 else "combination of scope bits was"
            legend += f"\n{self.left_out} more {more} judged too; --all shows them"
        return "\n".join([*lines, "", legend])

    def flow_lines(self) -> str:
        """One line for each way by which information passes from types to others that may not read them."""
        ways: dict[bool, dict[tuple[int, tuple[str, ...]], list[int]]] = {True: {}, False: {}}
        for (query, key), flow in self._simplest().items():
            leak = bool(self.leaks[self.groups[query][0], self.groups[key][0]])
            ways[leak].setdefault((key, flow.path[1:-1]), []).append(query)
        blocks = []
        if ways[True]:
            blocks.append(self._lines("Leaks past SAFETY_SCOPE, over several layers along these reads:", ways[True]))
        if ways[False]:
            blocks.append(self._lines("Indirect flows, over several layers along these reads:", ways[False]))
        return "\n\n".join(blocks) or "No indirect flows: what reaches a token over several layers, it may also read."

    def _lines(self, heading: str, readers: dict[tuple[int, tuple[str, ...]], list[int]]) -> str:
        """A heading and a line for each way; sources that reach the same readers by the same way share a line."""
        sources: dict[tuple[tuple[str, ...], tuple[int, ...]], list[int]] = {}
        for (key, via), queries in readers.items():
            sources.setdefault((via, tuple(queries)), []).append(key)
        text = [
            "  " + " -> ".join([self._label(keys), *(name.replace("+", " +", 1) for name in via), self._label(queries)])
            for (via, queries), keys in sources.items()
        ]
        return "\n".join([heading, *text])

    def _behaviours(self) -> dict[int, list[int]]:
        """Shown types by behaviour: equal rows and columns in table and closure."""
        tables = (self.rules.table, self.closure, self.leaks)
        rows = np.concatenate([side for table in tables for side in (table, table.T)], axis=1)
        _, group = np.unique(rows, axis=0, return_inverse=True)
        members: dict[int, list[int]] = {}
        for scope in self.scopes:
            for role in range(len(self.rules.roles)):
                kind = role * SCOPES + scope
                members.setdefault(int(group.reshape(-1)[kind]), []).append(kind)
        return members

    def _simplest(self) -> dict[tuple[int, int], Flow]:
        """For each (reader's group, source's group) the shortest flow, with the fewest scope bits on its way."""
        names = {type_name(kind, self.rules.roles): group for group, kinds in self.groups.items() for kind in kinds}
        found: dict[tuple[int, int], Flow] = {}
        for flow in indirect_flows(self.rules):
            if flow.query in names and flow.key in names:
                pair = (names[flow.query], names[flow.key])
                if pair not in found or _simplicity(flow) < _simplicity(found[pair]):
                    found[pair] = flow
        return dict(sorted(found.items(), key=lambda item: self._order(item[0][1]) + self._order(item[0][0])))

    def _order(self, group: int) -> tuple[int, int]:
        first = self.groups[group][0]
        return self.scopes.index(first % SCOPES), first // SCOPES

    def _label(self, groups: Sequence[int]) -> str:
        """The types of some groups by role: ``user, data; every role +SAFETY_SCOPE``."""
        kinds = {kind for group in groups for kind in self.groups[group]}
        by_roles: dict[str, list[int]] = {}
        for scope in self.scopes:
            roles = [role for i, role in enumerate(self.rules.roles) if i * SCOPES + scope in kinds]
            if roles:
                text = "every role" if len(roles) == len(self.rules.roles) else ", ".join(roles)
                by_roles.setdefault(text, []).append(scope)
        return "; ".join(
            roles if scopes == [0] else f"{roles} {' or '.join(map(_scope_name, scopes))}"
            for roles, scopes in by_roles.items()
        )


def _mask(bits: tuple[str, ...]) -> int:
    return sum(1 << i for i, bit in enumerate(SCOPE_BITS) if bit.name in bits)


def _scope_name(scope: int) -> str:
    return "".join(f"+{bit.name}" for i, bit in enumerate(SCOPE_BITS) if scope >> i & 1) or "plain"


def _abbreviations(names: Sequence[str]) -> list[str]:
    """Shortest beginnings that tell the names apart."""
    return [
        next(name[:n] for n in range(1, len(name) + 1) if n == len(name) or _alone(name[:n], name, names))
        for name in names
    ]


def _alone(start: str, name: str, names: Sequence[str]) -> bool:
    return not any(other.startswith(start) for other in names if other != name)


def _simplicity(flow: Flow) -> tuple[int, int]:
    return len(flow.path), sum(name.count("+") for name in flow.path)
