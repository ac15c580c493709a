"""Mask rules: YAML list -> boolean tables over token types (spec section 3, mask algebra of definitions 6.4).

A token's *type* is its role and its three scope bits (TOOL_SCOPE, SAFETY_SCOPE, RET_SCOPE): ``role * 8 + scope``.
Rules compile to ``table[type_q, type_k]``; an edge q <- k within a sample is legal iff

* both tokens are in the same document (``document >= 0``; a negative document marks padding, which has no edges);
* CAUSAL: ``k <= q``, relaxed where a ``causal: false`` rule matches both tokens and they share a segment;
* SEGMENT: both are in the same segment, or the key's role is shared (``system``);
* ``table[type_q, type_k]``: the key's role is in ``allow_read_from`` of every rule that matches q, and the query's
  role is in ``allow_write_to`` of every rule that matches k. A missing list restricts nothing, a blank one is an error.

A token always reads itself. A rule whose ``when`` names bits describes a *scope*: its lists govern the edges that
cross the scope's boundary, and edges between two tokens that both carry all of its bits are inside the scope and free
of that rule. So ``{when: {bits: [SAFETY_SCOPE]}, allow_write_to: []}`` means "only tokens of the scope may read it".
Bits without a rule restrict nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import numpy.typing as npt

from refractor_megatron.distinction.roles import ROLES, SCOPE_BITS, MaskBit
from refractor_megatron.errors import ConfigError

BoolTable = npt.NDArray[np.bool_]
#: Way from a list of rules to a value in it: indices and field names.
RulePath = tuple[int | str, ...]

#: Roles that every segment of their document may read.
SHARED_ROLES: tuple[str, ...] = ("system",)
#: Scope buckets per role: every subset of ``SCOPE_BITS``.
SCOPES = 1 << len(SCOPE_BITS)

#: Rules of a set: far beyond what a person can oversee, and judged in about a second.
MOST_RULES = 1000

_FIELDS = ("name", "when", "allow_read_from", "allow_write_to", "causal")
#: The fields that restrict who reads whom.
LISTS = ("allow_read_from", "allow_write_to")
_WHEN_FIELDS = ("role", "bits")


class RuleError(ConfigError):
    """A mistake in a rule set, with what a reader of a file needs to point at it.

    rule: name of the rule, None where it has none yet. path: from the list of rules to the wrong value, or to the
    field: ``(2, "when", "bits", 0)``; ``()`` is the list itself. complaint: the sentence after the subject. of_key: the
    field's name is wrong, not its value.
    """

    def __init__(self, rule: str | None, path: RulePath, complaint: str, of_key: bool = False) -> None:
        self.rule, self.path, self.complaint, self.of_key = rule, path, complaint, of_key
        index = f"[{path[0]}]" if path else ""
        super().__init__(f"safety.masks{index if rule is None else f' rule {rule!r}'} {complaint}")


@dataclass(frozen=True)
class Rule:
    """One validated rule; ``None`` in a list means "no restriction"."""

    name: str
    role: str | None
    bits: tuple[str, ...]
    allow_read_from: tuple[str, ...] | None
    allow_write_to: tuple[str, ...] | None
    causal: bool

    def canonical(self) -> dict[str, Any]:
        """The rule as plain data; what the digest of a rule set is computed from."""
        return {
            "name": self.name,
            "when": {"role": self.role, "bits": list(self.bits)},
            "allow_read_from": None if self.allow_read_from is None else list(self.allow_read_from),
            "allow_write_to": None if self.allow_write_to is None else list(self.allow_write_to),
            "causal": self.causal,
        }


@dataclass(frozen=True, eq=False)
class CompiledRules:
    """A rule set as tables over T = len(roles) * 8 token types. Compare and hash by ``digest``.

    table: bool [T, T], ``table[type_q, type_k]``: the rules allow q to read k.
    noncausal: bool [T, T], symmetric: q may also read k after it, within one segment.
    safety_forbidden: bool [T, T]: pairs that a rule naming SAFETY_SCOPE forbids.
    shared: bool [T]: the type's role is readable from other segments.
    digest: sha256 of the canonical rules, stored in checkpoints.
    """

    rules: tuple[Rule, ...]
    roles: tuple[str, ...]
    shared_roles: tuple[str, ...]
    table: BoolTable
    noncausal: BoolTable
    safety_forbidden: BoolTable
    shared: BoolTable
    #: int32 [T]: types that no table tells apart share a class; runs of one class are one run of keys.
    type_class: npt.NDArray[np.int32]
    digest: str

    def __eq__(self, other: object) -> bool:
        """Equal rule sets have equal digests."""
        return isinstance(other, CompiledRules) and other.digest == self.digest

    def __hash__(self) -> int:
        """Hash of the digest."""
        return hash(self.digest)

    @property
    def types(self) -> int:
        """Number of token types T."""
        return len(self.roles) * SCOPES

    @property
    def causal(self) -> bool:
        """False when some rule relaxes causality; a training configuration refuses such a set."""
        return not self.noncausal.any()

    def noncausal_rules(self) -> tuple[str, ...]:
        """Names of the rules with ``causal: false``."""
        return tuple(rule.name for rule in self.rules if not rule.causal)


def type_name(index: int, roles: Sequence[str]) -> str:
    """Readable name of a token type, e.g. ``tool+SAFETY_SCOPE``."""
    role, scope = divmod(index, SCOPES)
    bits = [str(bit.name) for i, bit in enumerate(SCOPE_BITS) if scope >> i & 1]
    return "+".join([roles[role], *bits])


def scope_of(mask_bits: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int32]:
    """Scope index 0..7 of each ``mask_bits`` value; CAUSAL and SEGMENT bits are not scopes."""
    bits = mask_bits.astype(np.int32)
    out = np.zeros_like(bits)
    for i, bit in enumerate(SCOPE_BITS):
        out |= ((bits & int(bit)) != 0).astype(np.int32) << i
    return out


def token_types(records: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int32]:
    """Token types int32 [..., L] of records [..., L, 4] = (document, segment, role, mask_bits)."""
    return (records[..., 2].astype(np.int32) * SCOPES + scope_of(records[..., 3])).astype(np.int32)


def compile_rules(
    rules: Sequence[Mapping[str, Any]],
    roles: Sequence[str] = ROLES,
    shared_roles: Sequence[str] = SHARED_ROLES,
) -> CompiledRules:
    """Validates and compiles a rule list (the value of ``safety.masks``).

    The result does not depend on the order of the list. Errors: ``RuleError`` (a ``ConfigError``) naming the rule and
    the field. Leaks through several layers are refused by ``closure.check_closure``, which the configuration calls too.
    """
    if isinstance(rules, str | bytes | Mapping) or not isinstance(rules, Sequence):
        raise RuleError(None, (), f"must be a list of rules, not {type(rules).__name__}.")
    role_names = tuple(roles)
    for role in shared_roles:
        if role not in role_names:
            raise ConfigError(f"shared role {role!r} is not among the roles {', '.join(role_names)}.")
    if len(rules) > MOST_RULES:
        raise RuleError(None, (), f"holds {len(rules)} rules; at most {MOST_RULES} are possible.")
    parsed: dict[str, Rule] = {}
    for index, raw in enumerate(rules):
        rule = _parse(index, raw, role_names)
        if rule.name in parsed:
            raise RuleError(rule.name, (index, "name"), "is there twice; give each rule its own name.")
        parsed[rule.name] = rule
    ordered = tuple(parsed[name] for name in sorted(parsed))
    return _tables(ordered, role_names, tuple(sorted(set(shared_roles))))


def _parse(index: int, raw: object, roles: tuple[str, ...]) -> Rule:
    if not isinstance(raw, Mapping):
        raise RuleError(None, (index,), f"must be a mapping with the fields {', '.join(_FIELDS)}, not {raw!r}.")
    name = raw.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RuleError(None, (index, "name"), f"field name must be a non-empty string, not {name!r}.")
    if not name.isprintable():
        raise RuleError(None, (index, "name"), f"field name must be one line of printable characters, not {name!a}.")
    at = _Place(name, (index,))
    at.known_fields(raw, _FIELDS)
    role, bits = _parse_when(at.inside("when"), raw.get("when"), roles)
    causal = raw.get("causal", True)
    if not isinstance(causal, bool):
        raise at.inside("causal").error(f"must be true or false, not {causal!r}.")
    readable, readers = (_role_list(at.inside(field), raw, field, roles) for field in LISTS)
    if causal and readable is None and readers is None:
        raise at.error(f"restricts nothing; give it {' or '.join(LISTS)}, [] for nobody, or remove the rule.")
    return Rule(name, role, bits, readable, readers, causal)


@dataclass(frozen=True)
class _Place:
    """Where in a rule the parser stands; makes the errors."""

    rule: str
    path: RulePath

    def inside(self, *steps: int | str) -> _Place:
        return _Place(self.rule, (*self.path, *steps))

    def error(self, complaint: str) -> RuleError:
        field = ".".join(step for step in self.path if isinstance(step, str))
        return RuleError(self.rule, self.path, f"field {field} {complaint}" if field else complaint)

    def known_fields(self, raw: Mapping[Any, Any], known: tuple[str, ...]) -> None:
        for field in raw:
            if field not in known:
                wrong = self.error(f"has an unknown field {field!r}{nearest(field, known)}.")
                raise RuleError(self.rule, (*self.path, field), wrong.complaint, of_key=True)

    def known_name(self, value: object, known: tuple[str, ...], kind: str) -> None:
        if not isinstance(value, str) or value not in known:
            raise self.error(f"names an unknown {kind} {value!r}{nearest(value, known)}.")


def _parse_when(at: _Place, when: object, roles: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    if not isinstance(when, Mapping) or not when:
        raise at.error(f"must name a role, bits or both, e.g. {{role: tool}}, not {when!r}.")
    at.known_fields(when, _WHEN_FIELDS)
    role = when.get("role")
    if "role" in when:
        at.inside("role").known_name(role, roles, "role")
    bits = when.get("bits", ())
    if "bits" not in when:
        pass
    elif isinstance(bits, str) or not isinstance(bits, Sequence) or not bits:
        raise at.inside("bits").error(f"must be a non-empty list of scope bits, not {bits!r}.")
    names = tuple(str(bit.name) for bit in SCOPE_BITS)
    for i, bit in enumerate(bits):
        place = at.inside("bits", i)
        if bit in (MaskBit.CAUSAL.name, MaskBit.SEGMENT.name):
            raise place.error(
                f"names {bit}, which acts on positions and segments and cannot select tokens; use {', '.join(names)}."
            )
        place.known_name(bit, names, "scope bit")
    return role, tuple(sorted(set(bits)))


def _role_list(at: _Place, rule: Mapping[Any, Any], field: str, roles: tuple[str, ...]) -> tuple[str, ...] | None:
    if field not in rule:
        return None
    value = rule[field]
    if value is None:  # blank could mean anyone or nobody: a safety rule must not guess
        raise at.error("is blank; write [] for nobody, or leave the field out to restrict nothing.")
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise at.error(f"must be a list of roles, not {value!r}.")
    for i, role in enumerate(value):
        at.inside(i).known_name(role, roles, "role")
    return tuple(role for role in roles if role in value)


def nearest(value: object, known: tuple[str, ...]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or all of them."""
    close = get_close_matches(str(value), known, n=1)
    return f"; did you mean {close[0]!r}" if close else f"; known are {', '.join(known)}"


def _tables(rules: tuple[Rule, ...], roles: tuple[str, ...], shared_roles: tuple[str, ...]) -> CompiledRules:
    types = len(roles) * SCOPES
    table = np.ones((types, types), dtype=np.bool_)
    noncausal = np.zeros_like(table)
    safety_forbidden = np.zeros_like(table)
    for rule in rules:
        allowed, both = rule_table(rule, roles)
        table &= allowed
        if MaskBit.SAFETY_SCOPE.name in rule.bits:
            safety_forbidden |= ~allowed
        if not rule.causal:
            noncausal |= both
    shared = np.isin(np.arange(types) // SCOPES, [roles.index(role) for role in shared_roles])
    canonical = {
        "version": 1,
        "roles": list(roles),
        "shared_roles": list(shared_roles),
        "rules": [rule.canonical() for rule in rules],
    }
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    arrays = (table, noncausal, safety_forbidden, shared, _type_classes(table, noncausal, shared))
    for array in arrays:
        array.setflags(write=False)
    return CompiledRules(rules, roles, shared_roles, *arrays, digest=hashlib.sha256(text.encode()).hexdigest())


def rule_table(rule: Rule, roles: tuple[str, ...]) -> tuple[BoolTable, BoolTable]:
    """-> (pairs the rule allows, pairs of which it matches both ends), each [T, T] as [query, key]."""
    types = np.arange(len(roles) * SCOPES)
    role_of, scope = types // SCOPES, types % SCOPES
    mask = sum(1 << i for i, bit in enumerate(SCOPE_BITS) if bit.name in rule.bits)
    in_scope = (scope & mask) == mask
    match = in_scope if rule.role is None else in_scope & (role_of == roles.index(rule.role))
    forbidden = np.zeros((len(types), len(types)), dtype=np.bool_)
    if rule.allow_read_from is not None:
        readable = np.isin(role_of, [roles.index(role) for role in rule.allow_read_from])
        forbidden |= match[:, None] & ~readable[None, :]
    if rule.allow_write_to is not None:
        writable = np.isin(role_of, [roles.index(role) for role in rule.allow_write_to])
        forbidden |= ~writable[:, None] & match[None, :]
    if rule.bits:
        forbidden &= ~(in_scope[:, None] & in_scope[None, :])
    return ~forbidden, match[:, None] & match[None, :]


def _type_classes(table: BoolTable, noncausal: BoolTable, shared: BoolTable) -> npt.NDArray[np.int32]:
    """Groups types with equal rows and columns in every table, so that plain text of mixed roles stays one run."""
    rows = np.concatenate([table, table.T, noncausal, noncausal.T, shared[:, None]], axis=1)
    _, classes = np.unique(rows, axis=0, return_inverse=True)
    return classes.reshape(-1).astype(np.int32)
