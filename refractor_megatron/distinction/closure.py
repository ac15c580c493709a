"""Information flow through several layers: the transitive closure of legal edges.

Attention composes: when q reads m and m read k in the layer below, k reaches q although q may not read k. The closure
of the type table bounds what any number of layers can carry (every type may stand anywhere in a document), so a rule
set whose closure contains a pair that a SAFETY_SCOPE rule forbids is refused, and every other indirect flow is listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from refractor_megatron.distinction.contradictions import check_contradictions
from refractor_megatron.distinction.roles import ROLES, MaskBit
from refractor_megatron.distinction.rules import (
    SCOPES,
    SHARED_ROLES,
    BoolTable,
    CompiledRules,
    compile_rules,
    rule_table,
    type_name,
)
from refractor_megatron.errors import ConfigError

if TYPE_CHECKING:
    import torch


class LeakError(ConfigError):
    """Text passes a SAFETY_SCOPE rule over several layers.

    rules: names of the rules that forbid the flow directly. complaint: the sentence after the subject.
    """

    def __init__(self, rules: tuple[str, ...], complaint: str) -> None:
        self.rules, self.complaint = rules, complaint
        super().__init__(f"safety.masks {complaint}")


@dataclass(frozen=True)
class Flow:
    """``key`` reaches ``query`` through ``path`` (type names, key first), though ``query`` may not read it directly."""

    query: str
    key: str
    path: tuple[str, ...]


def transitive_closure(edges: npt.NDArray[np.bool_]) -> BoolTable:
    """Transitive closure of a boolean relation [n, n], by squaring: pairs joined by one or more edges."""
    closed = edges
    while True:
        # float32 counts of at most n <= 2**24 paths are exact enough for "> 0".
        wider = closed | ((closed.astype(np.float32) @ closed.astype(np.float32)) > 0)
        if (wider == closed).all():
            return closed
        closed = wider


def reachable(legal: torch.Tensor) -> torch.Tensor:
    """Token-level closure for perturbation tests: bool [L, L] legal edges (q, k) -> bool [L, L] "k can influence q".

    Covers any number of layers. ``legal`` must hold every edge of every tier (a summary counts as all its tokens).
    """
    import torch  # here, because checking rules needs no torch

    assert legal.dtype == torch.bool and legal.dim() == 2 and legal.shape[0] == legal.shape[1], legal.shape
    # A token always reaches itself: the residual stream carries it past attention.
    edges = legal.cpu().numpy() | np.eye(len(legal), dtype=np.bool_)
    return torch.from_numpy(transitive_closure(edges)).to(legal.device)


def indirect_flows(rules: CompiledRules) -> list[Flow]:
    """All pairs of types that reach each other over several layers but not directly, in type order."""
    leaks = transitive_closure(rules.table) & ~rules.table
    return [_flow(rules, int(q), int(k)) for q, k in np.argwhere(leaks)]


def compile_checked(
    rules: Sequence[Mapping[str, Any]], roles: Sequence[str] = ROLES, shared_roles: Sequence[str] = SHARED_ROLES
) -> tuple[CompiledRules, list[Flow]]:
    """``compile_rules``, ``check_contradictions`` and ``check_closure`` in one step: the door for configurations."""
    compiled = compile_rules(rules, roles, shared_roles)
    check_contradictions(compiled)
    return compiled, check_closure(compiled)


def check_closure(rules: CompiledRules) -> list[Flow]:
    """Refuses a leaking rule set and returns the other indirect flows.

    Errors: ``LeakError`` when the closure contains a pair that a rule naming SAFETY_SCOPE forbids directly.
    """
    leaks = transitive_closure(rules.table) & rules.safety_forbidden
    if leaks.any():
        query, key = (int(x) for x in min(np.argwhere(leaks).tolist(), key=lambda pair: _simplicity(*pair)))
        flow = _flow(rules, query, key)
        scoped = [rule for rule in rules.rules if MaskBit.SAFETY_SCOPE.name in rule.bits]
        guilty = [rule for rule in scoped if not rule_table(rule, rules.roles)[0][query, key]]
        names = tuple(rule.name for rule in guilty)
        if all(rule.role is not None for rule in guilty):
            way_out = (
                "a scope rule that names a role leaves the scope's other roles free to carry its text out: drop the "
                "role, or add a rule on the bit alone"
            )
        else:
            way_out = "tighten the rule's allow_write_to or forbid a step of that path"
        raise LeakError(
            names,
            f"leaks across SAFETY_SCOPE: rule {' or '.join(map(repr, names))} forbids {flow.query} to read "
            f"{flow.key}, but over several layers it flows {' -> '.join(flow.path)}; "
            f"{way_out}.",
        )
    return indirect_flows(rules)


def _simplicity(query: int, key: int) -> tuple[int, int, int]:
    """Order in which leaks are shown: types with few scope bits are the easiest to understand."""
    bits = (query % SCOPES).bit_count() + (key % SCOPES).bit_count()
    return bits, query, key


def _flow(rules: CompiledRules, query: int, key: int) -> Flow:
    path = [type_name(t, rules.roles) for t in _shortest_path(rules.table, query, key)]
    return Flow(type_name(query, rules.roles), type_name(key, rules.roles), tuple(path))


def _shortest_path(table: npt.NDArray[np.bool_], query: int, key: int) -> list[int]:
    """Types from key to query along legal reads (breadth first, lowest type first); a cycle when they are equal."""
    came_from: dict[int, int] = {}
    frontier = [key]
    while frontier and query not in came_from:
        following: list[int] = []
        for via in frontier:
            for reader in np.flatnonzero(table[:, via]).tolist():
                if reader not in came_from:
                    came_from[reader] = via
                    following.append(reader)
        frontier = following
    assert query in came_from, (query, key)
    path = [query, came_from[query]]
    while path[-1] != key:
        path.append(came_from[path[-1]])
    return path[::-1]
