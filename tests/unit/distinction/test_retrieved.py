"""Who may read a retrieved record: the definition and its table for all types."""

from __future__ import annotations

import numpy as np
import pytest

from refractor_megatron.distinction.generators import random_rules
from refractor_megatron.distinction.retrieved import may_read, policy_table, retrieved_type
from refractor_megatron.distinction.roles import ROLE_ID, SCOPE_BITS, MaskBit, RecordPolicy
from refractor_megatron.distinction.rules import SCOPES, compile_rules, token_types

NOTHING, BOTH = RecordPolicy(0), RecordPolicy.ALLOW_TOOLS | RecordPolicy.ALLOW_COPY


@pytest.mark.parametrize("seed", range(5))
def test_the_table_says_of_every_type_and_policy_what_the_definition_says(seed: int) -> None:
    rules = compile_rules(random_rules(np.random.default_rng(seed)))
    table = policy_table(rules)
    for kind in range(rules.types):
        role, scope = divmod(kind, SCOPES)
        bits = sum(int(bit) for i, bit in enumerate(SCOPE_BITS) if scope >> i & 1)
        for code, policy in enumerate([0, 1, 2, 3, None]):
            assert table[kind, code] == may_read(rules, role, bits, policy), (kind, policy)


def test_policies_without_rules() -> None:
    rules = compile_rules([])
    user, tool, assistant = (ROLE_ID[name] for name in ("user", "tool", "assistant"))
    assert may_read(rules, user, 0, NOTHING) and not may_read(rules, user, MaskBit.TOOL_SCOPE, NOTHING)
    assert not may_read(rules, tool, 0, RecordPolicy.ALLOW_COPY) and may_read(rules, tool, 0, BOTH)
    assert not may_read(rules, assistant, 0, RecordPolicy.ALLOW_TOOLS) and may_read(rules, assistant, 0, BOTH)
    assert not may_read(rules, user, 0, None)


def test_a_record_has_the_type_of_data_in_ret_scope() -> None:
    rules = compile_rules([])
    (kind,) = token_types(np.array([[0, 0, ROLE_ID["data"], MaskBit.RET_SCOPE]], dtype=np.int32))
    assert retrieved_type(rules) == kind
