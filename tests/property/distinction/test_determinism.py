"""A rule set is a set: its order, and the order inside its lists, change neither digest nor tables nor masks."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from refractor_megatron.distinction.generators import random_records, random_rules
from refractor_megatron.distinction.intervals import compile_intervals
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.roles import ROLES
from refractor_megatron.distinction.rules import compile_rules

TABLES = ("table", "noncausal", "safety_forbidden", "shared", "type_class")


def shuffled(rules: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Rules, their fields and their lists in another order; some list entries twice."""
    out = []
    for rule in copy.deepcopy(rules):
        for field in ("allow_read_from", "allow_write_to"):
            if field in rule:
                rule[field] = rng.sample(rule[field], len(rule[field])) + rule[field][:1]
        if "bits" in rule["when"]:
            rng.shuffle(rule["when"]["bits"])
        fields = list(rule.items())
        rng.shuffle(fields)
        out.append(dict(fields))
    rng.shuffle(out)
    return out


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1))
def test_order_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    raw = random_rules(rng, most=6)
    one, two = compile_rules(raw), compile_rules(shuffled(raw, random.Random(seed)))
    assert one.digest == two.digest
    for name in TABLES:
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes(), name
    records, pattern = random_records(rng, 60), LocalPattern(window=int(rng.integers(1, 30)))
    rows = [compile_intervals(records, rules, pattern).rows for rules in (one, two)]
    for name in ("row", "lo", "hi"):
        assert getattr(rows[0], name).tobytes() == getattr(rows[1], name).tobytes(), name


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_another_meaning_is_another_digest(seed: int) -> None:
    """Equal digests never hide different tables, nor a different field of some rule."""
    rng = np.random.default_rng(seed)
    raw = random_rules(rng, most=6)
    assume(raw)
    for rule in raw:
        rule.setdefault("allow_write_to", list(ROLES))  # or a rule whose causal is turned on would restrict nothing
    changed = copy.deepcopy(raw)
    rule = changed[int(rng.integers(len(changed)))]
    rule["causal"] = not rule["causal"]
    assert compile_rules(changed).digest != compile_rules(raw).digest
    rule["causal"] = not rule["causal"]
    rule["allow_read_from"] = [] if rule.get("allow_read_from") else ["user"]
    assert compile_rules(changed).digest != compile_rules(raw).digest
