"""Rules: what compiles to what, independence of order, and the sentences a user sees."""

from __future__ import annotations

import numpy as np
import pytest

from refractor_megatron.distinction.roles import ROLE_ID, ROLES, MaskBit
from refractor_megatron.distinction.rules import SCOPES, compile_rules, token_types, type_name
from refractor_megatron.errors import ConfigError

TOOL_RULE = {
    "name": "tool-scope",
    "when": {"role": "tool"},
    "allow_read_from": ["system", "user", "assistant"],
    "allow_write_to": ["assistant"],
    "causal": True,
}


def kind(role: str, *bits: MaskBit) -> int:
    """Type index through the record path."""
    record = np.array([[0, 0, ROLE_ID[role], sum(bits)]], dtype=np.int32)
    return int(token_types(record)[0])


def test_no_rules_allow_everything() -> None:
    compiled = compile_rules([])
    assert compiled.table.all() and not compiled.noncausal.any() and compiled.causal
    assert compiled.table.shape == (len(ROLES) * SCOPES,) * 2
    # Only the shared role differs from the rest, so plain text of mixed roles is one run.
    assert len(set(compiled.type_class.tolist())) == 2


def test_the_specification_example() -> None:
    """Tool tokens may read system, user and assistant, and may write to assistant."""
    table = compile_rules([TOOL_RULE]).table
    tool = kind("tool")
    readable = {role for role in ROLES if table[tool, kind(role)]}
    readers = {role for role in ROLES if table[kind(role), tool]}
    assert readable == {"system", "user", "assistant"}
    assert readers == {"assistant"}
    assert table[kind("user"), kind("assistant")], "a rule restricts only what it matches"


def test_both_ends_must_permit() -> None:
    """allow_write_to is the key's permission, allow_read_from the query's: one of them is not enough."""
    rules = [
        {"name": "a", "when": {"role": "tool"}, "allow_write_to": ["assistant", "user"]},
        {"name": "b", "when": {"role": "user"}, "allow_read_from": ["system", "user"]},
    ]
    table = compile_rules(rules).table
    assert table[kind("assistant"), kind("tool")]
    assert not table[kind("user"), kind("tool")]


def test_a_bits_rule_restricts_only_what_crosses_its_scope() -> None:
    rule = {"name": "safe", "when": {"bits": ["SAFETY_SCOPE"]}, "allow_write_to": []}
    table = compile_rules([rule]).table
    inside, outside = kind("user", MaskBit.SAFETY_SCOPE), kind("user")
    assert table[inside, inside] and table[inside, outside]
    assert not table[outside, inside]
    assert table[kind("tool", MaskBit.SAFETY_SCOPE, MaskBit.RET_SCOPE), inside]


def test_a_rule_over_role_and_bits_matches_both() -> None:
    rule = {"name": "x", "when": {"role": "tool", "bits": ["TOOL_SCOPE", "RET_SCOPE"]}, "allow_read_from": []}
    table = compile_rules([rule]).table
    both = kind("tool", MaskBit.TOOL_SCOPE, MaskBit.RET_SCOPE)
    assert not table[both, kind("user")]
    assert table[kind("tool", MaskBit.TOOL_SCOPE), kind("user")]
    assert table[both, kind("user", MaskBit.TOOL_SCOPE, MaskBit.RET_SCOPE)]


def test_causal_and_segment_bits_are_no_scope() -> None:
    assert kind("user", MaskBit.CAUSAL, MaskBit.SEGMENT) == kind("user")


def test_noncausal_flags_only_pairs_of_matching_tokens() -> None:
    compiled = compile_rules([{"name": "prefix", "when": {"role": "system"}, "causal": False}])
    assert not compiled.causal and compiled.noncausal_rules() == ("prefix",)
    assert compiled.noncausal[kind("system"), kind("system", MaskBit.RET_SCOPE)]
    assert not compiled.noncausal[kind("system"), kind("user")]
    assert not compiled.noncausal[kind("user"), kind("system")]


def test_order_does_not_matter_and_content_does() -> None:
    second = {"name": "other", "when": {"bits": ["RET_SCOPE"]}, "allow_write_to": ["assistant", "user"]}
    swapped = {**second, "allow_write_to": ["user", "assistant"]}
    one, two = compile_rules([TOOL_RULE, second]), compile_rules([swapped, TOOL_RULE])
    assert one == two and hash(one) == hash(two) and (one.table == two.table).all()
    assert one != compile_rules([TOOL_RULE])
    assert one.digest != compile_rules([TOOL_RULE, second], shared_roles=()).digest
    # Golden: a change of this digest breaks every checkpoint that recorded it.
    assert compile_rules([]).digest == "6c51c0e287431c13e394090dffc235293abc651691c2ebdee8ebe2ed1b9eba5c"


def test_tables_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        compile_rules([]).table[0, 0] = False


def test_roles_are_extensible() -> None:
    roles = (*ROLES, "critic")
    compiled = compile_rules([{"name": "c", "when": {"role": "critic"}, "allow_write_to": ["critic"]}], roles=roles)
    critic = len(ROLES) * SCOPES
    assert type_name(critic + 2, roles) == "critic+SAFETY_SCOPE"
    assert compiled.table[critic, critic] and not compiled.table[0, critic]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": ""}, ["safety.masks[0]", "name"]),
        ({"when": {}}, ["tool-scope", "when"]),
        ({"when": {"role": "toll"}}, ["tool-scope", "when.role", "'toll'", "did you mean 'tool'"]),
        ({"when": {"bits": ["SAFETY"]}}, ["tool-scope", "when.bits", "SAFETY_SCOPE"]),
        ({"when": {"bits": []}}, ["tool-scope", "when.bits", "non-empty"]),
        ({"when": {"bits": ["CAUSAL"]}}, ["tool-scope", "CAUSAL", "positions"]),
        ({"when": {"segment": 1}}, ["tool-scope", "'segment'"]),
        ({"allow_read_from": "user"}, ["tool-scope", "allow_read_from", "list"]),
        ({"allow_write_to": ["asistant"]}, ["tool-scope", "allow_write_to", "did you mean 'assistant'"]),
        ({"name": "two\nlines"}, ["safety.masks[0]", "printable", "two\\nlines"]),
        ({"name": "\u202eright"}, ["printable"]),
        ({"allow_write_to": None}, ["tool-scope", "allow_write_to is blank", "write [] for nobody"]),
        ({"allow_read_from": None}, ["tool-scope", "allow_read_from is blank"]),
        ({"when": {"role": "tool", "bits": None}}, ["tool-scope", "when.bits", "non-empty"]),
        ({"when": {"role": None, "bits": ["RET_SCOPE"]}}, ["tool-scope", "when.role", "None"]),
        ({"causal": "yes"}, ["tool-scope", "causal", "true or false"]),
        ({"allow_write": []}, ["tool-scope", "'allow_write'", "did you mean 'allow_write_to'"]),
    ],
)
def test_mistakes_name_rule_field_and_way_out(change: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        compile_rules([{**TOOL_RULE, **change}])
    for word in words:
        assert word in str(error.value)


def test_mistakes_of_the_list_itself() -> None:
    with pytest.raises(ConfigError, match="must be a list"):
        compile_rules({"name": "x"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be a mapping"):
        compile_rules(["tool"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="rule 'tool-scope' is there twice"):
        compile_rules([TOOL_RULE, TOOL_RULE])
    with pytest.raises(ConfigError, match="holds 1001 rules; at most 1000"):
        compile_rules([{**TOOL_RULE, "name": f"r{i}"} for i in range(1001)])
    with pytest.raises(ConfigError, match="shared role 'root'"):
        compile_rules([], shared_roles=("root",))


def test_a_rule_must_restrict_something() -> None:
    with pytest.raises(ConfigError, match="rule 'idle' restricts nothing; give it allow_read_from or allow_write_to"):
        compile_rules([{"name": "idle", "when": {"bits": ["SAFETY_SCOPE"]}}])
    assert not compile_rules([{"name": "prefix", "when": {"role": "system"}, "causal": False}]).causal
