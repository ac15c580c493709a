"""Each of the five mask classes on ten thousand random cases, against a plain reading of its sentence.

A case is a rule set and a record array that provoke one class: the class alone must forbid many edges, or the test
would prove nothing. The sentences are read from raw rules and records, without tables, runs or types. The cases of a
rule set are documents of one long array, which must not see each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from refractor_megatron.distinction.intervals import compile_intervals
from refractor_megatron.distinction.lowerings import BlockKind, block_map, dense_mask, mask_mod
from refractor_megatron.distinction.pattern import FULL, LocalPattern
from refractor_megatron.distinction.roles import ROLES, MaskBit
from refractor_megatron.distinction.rules import CompiledRules, compile_rules

CASES, SAMPLES_PER_RULE_SET, LONGEST = 10_000, 20, 14
SCOPES = ("TOOL_SCOPE", "SAFETY_SCOPE", "RET_SCOPE")
Token = tuple[int, int, str, frozenset[str]]
Rules = list[dict[str, Any]]


# The five classes in words: may token q at position i read token k at position j, as far as the class goes?


def causal(rules: Rules, q: Token, k: Token, i: int, j: int) -> bool:
    """Nothing later is read, unless a rule with causal: false matches both tokens and they share a segment."""
    return j <= i or (q[1] == k[1] and any(not r["causal"] and matches(r, q) and matches(r, k) for r in rules))


def segment(rules: Rules, q: Token, k: Token, i: int, j: int) -> bool:
    """Both in one segment, or the key a system token."""
    return q[1] == k[1] or k[2] == "system"


def scope(name: str) -> Callable[[Rules, Token, Token, int, int], bool]:
    """Every rule about the bit permits the edge, unless both tokens are inside that rule's scope."""

    def check(rules: Rules, q: Token, k: Token, i: int, j: int) -> bool:
        return all(permits(r, q, k) for r in rules if name in r["when"].get("bits", ()))

    return check


def roles_only(rules: Rules, q: Token, k: Token, i: int, j: int) -> bool:
    """No class, but part of legality: the rules that name no bit."""
    return all(permits(r, q, k) for r in rules if "bits" not in r["when"])


def matches(rule: dict[str, Any], token: Token) -> bool:
    when = rule["when"]
    return when.get("role") in (None, token[2]) and set(when.get("bits", ())) <= token[3]


def permits(rule: dict[str, Any], q: Token, k: Token) -> bool:
    bits = set(rule["when"].get("bits", ()))
    if bits and bits <= q[3] and bits <= k[3]:
        return True
    if matches(rule, q) and rule.get("allow_read_from") is not None and k[2] not in rule["allow_read_from"]:
        return False
    return not (matches(rule, k) and rule.get("allow_write_to") is not None and q[2] not in rule["allow_write_to"])


CLASSES = {"CAUSAL": causal, "SEGMENT": segment, **{name: scope(name) for name in SCOPES}}


def provoking(rng: np.random.Generator, name: str) -> Rules:
    """Up to three rules of which at least one is about the class, where rules can be about it."""
    rules: Rules = []
    for n in range(int(rng.integers(1, 4))):
        when: dict[str, Any] = {}
        if name in SCOPES and (n == 0 or rng.random() < 0.5):
            others = [other for other in SCOPES if other != name and rng.random() < 0.2]
            when["bits"] = [name, *others]
        if not when or rng.random() < 0.3:
            when["role"] = str(rng.choice(ROLES))
        relaxed = rng.random() < (0.7 if name == "CAUSAL" else 0.2)
        rule: dict[str, Any] = {"name": f"r{n}", "when": when, "causal": not relaxed}
        for field in ("allow_read_from", "allow_write_to"):
            if rng.random() < (0.15 if name in ("CAUSAL", "SEGMENT") else 0.7):
                rule[field] = [role for role in ROLES if rng.random() < 0.5]
        if not relaxed and len(rule) == 3:  # a rule must restrict something
            rule["allow_read_from"] = list(ROLES)
        rules.append(rule)
    return rules


def tokens_of(rng: np.random.Generator, name: str) -> npt.NDArray[np.int32]:
    """Records of short runs; documents, segments, roles and bits return; some documents are padding."""
    length = int(rng.integers(1, LONGEST + 1))
    runs = np.cumsum(rng.random(length) < 0.5)
    count = int(runs[-1]) + 1
    rows = np.zeros((count, 4), dtype=np.int32)
    rows[:, 0] = rng.choice([0, 0, 0, 0, 0, 0, 1, -1], count)
    rows[:, 1] = rng.integers(0, 4 if name == "SEGMENT" else 2, count)
    rows[:, 2] = rng.integers(0, len(ROLES), count)
    bits = rng.random((count, 5)) < 0.4
    rows[:, 3] = bits @ np.array([1, 2, 4, 8, 16])
    return rows[runs]


def in_documents(records: npt.NDArray[np.int32], first: int) -> npt.NDArray[np.int32]:
    """The same records with documents that are numbered from ``first``; padding stays padding."""
    records[:, 0] = np.where(records[:, 0] >= 0, records[:, 0] + first, -1)
    return records


def pattern_of(rng: np.random.Generator) -> LocalPattern:
    if rng.random() < 0.5:
        return FULL
    kind = ("sliding", "dilated", "block", "hybrid")[int(rng.integers(4))]
    return LocalPattern(kind, int(rng.integers(1, LONGEST)), int(rng.integers(1, 4)), int(rng.integers(1, 4)))


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", CLASSES)
def test_ten_thousand_cases(name: str) -> None:
    rng = np.random.default_rng(list(CLASSES).index(name))
    alone = edges = 0
    for _ in range(CASES // SAMPLES_PER_RULE_SET):
        raw, pattern = provoking(rng, name), pattern_of(rng)
        cases = [in_documents(tokens_of(rng, name), 2 * n) for n in range(SAMPLES_PER_RULE_SET)]
        mask = agreed(np.concatenate(cases), compile_rules(raw), pattern, rng)
        edges += int(mask.sum())
        stop = 0
        for records in cases:
            start, stop = stop, stop + len(records)
            alone += check_words(mask[start:stop, start:stop], start, records, raw, name, pattern)
            mask[start:stop, start:stop] = False
        assert not mask.any(), "an edge between two cases"
    # The class mattered: it alone decided at least one edge in two hundred.
    assert alone > edges / 200, (alone, edges)


def agreed(
    records: npt.NDArray[np.int32], rules: CompiledRules, pattern: LocalPattern, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """bool [L, L]: the mask, on which intervals, dense oracle and mask_mod agree; its block map is right as well."""
    length, tensor = len(records), torch.from_numpy(records)
    rows = compile_intervals(records, rules, pattern).rows
    mask = rows.dense(length, 0, length)
    assert (dense_mask(tensor, rules, pattern).numpy() == mask).all()
    index = torch.arange(length)
    assert (mask_mod(tensor, rules, pattern)(index[:, None], index).numpy() == mask).all()
    q_block, k_block = (int(x) for x in rng.integers(1, 8, 2))
    tiles = block_map(rows, length, length, q_block, k_block)
    across = np.add.reduceat(mask.astype(np.int64), np.arange(0, length, q_block), axis=0)
    counted = np.add.reduceat(across, np.arange(0, length, k_block), axis=1)
    ones = np.add.reduceat(np.ones_like(mask, dtype=np.int64), np.arange(0, length, q_block), axis=0)
    area = np.add.reduceat(ones, np.arange(0, length, k_block), axis=1)
    assert (tiles.edges == counted).all()
    assert ((tiles.kind == BlockKind.EMPTY) == (counted == 0)).all(), "an empty block holds an edge, or the reverse"
    assert ((tiles.kind == BlockKind.FULL) == (counted == area)).all(), "a full block lacks an edge, or the reverse"
    return mask


def check_words(
    mask: npt.NDArray[np.bool_],
    start: int,
    records: npt.NDArray[np.int32],
    rules: Rules,
    name: str,
    pattern: LocalPattern,
) -> int:
    """Compares every edge with the sentences; returns the number of edges that the class alone forbids.

    ``mask`` [L, L] is that of ``records``, whose first token stands at ``start`` of the array.
    """
    tokens: list[Token] = [
        (document, part, ROLES[role], frozenset(bit for bit in SCOPES if bits & MaskBit[bit]))
        for document, part, role, bits in records.tolist()
    ]
    index = torch.arange(start, start + len(tokens))
    within = pattern.allows(index[:, None], index).tolist()
    others = [check for other, check in CLASSES.items() if other != name] + [roles_only]
    own, alone, edge = CLASSES[name], 0, mask.tolist()
    for i, q in enumerate(tokens):
        for j, k in enumerate(tokens):
            if q[0] != k[0] or q[0] < 0 or not within[i][j]:
                assert not edge[i][j], "an edge between documents, in padding, or out of the pattern"
            elif i == j:
                assert edge[i][j], "the self edge is missing"
            else:
                may, rest = own(rules, q, k, i, j), all(check(rules, q, k, i, j) for check in others)
                assert may or not edge[i][j], f"an edge that {name} forbids: {q} <- {k} under {rules}"
                assert edge[i][j] == (may and rest), f"{q} <- {k} under {rules}"
                alone += rest and not may
    return alone
