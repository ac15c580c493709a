"""Closure: what flows over several layers, and which rule sets are refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from refractor_megatron.distinction.closure import (
    check_closure,
    compile_checked,
    indirect_flows,
    reachable,
    transitive_closure,
)
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.errors import ConfigError

SEALED = {"name": "sealed", "when": {"bits": ["SAFETY_SCOPE"]}, "allow_write_to": []}


def test_closure_joins_chains_and_needs_a_path() -> None:
    edges = np.zeros((4, 4), dtype=np.bool_)
    edges[1, 0] = edges[2, 1] = edges[3, 2] = True
    closed = transitive_closure(edges)
    assert (closed == np.tril(np.ones((4, 4)), -1).astype(bool)).all()


def test_an_indirect_flow_is_listed_with_its_path() -> None:
    """The trap of the specification: tool -> assistant -> everyone who reads assistant."""
    rules, flows = compile_checked([{"name": "t", "when": {"role": "tool"}, "allow_write_to": ["assistant"]}])
    flow = next(flow for flow in flows if (flow.query, flow.key) == ("user", "tool"))
    assert flow.path == ("tool", "assistant", "user")
    assert flows == indirect_flows(rules)


def test_a_type_may_reach_itself_through_another() -> None:
    rules = compile_rules([{"name": "t", "when": {"role": "tool"}, "allow_read_from": ["user"]}])
    flow = next(flow for flow in indirect_flows(rules) if (flow.query, flow.key) == ("tool", "tool"))
    assert flow.path[0] == flow.path[-1] == "tool" and len(flow.path) == 3


def test_no_rules_no_indirect_flows() -> None:
    assert check_closure(compile_rules([])) == []


def test_a_sealed_scope_is_accepted() -> None:
    assert check_closure(compile_rules([SEALED])) == []


def test_a_leak_across_safety_scope_is_refused_by_name() -> None:
    with pytest.raises(ConfigError) as error:
        compile_checked([{**SEALED, "allow_write_to": ["assistant"]}])
    text = str(error.value)
    assert "'sealed'" in text and "SAFETY_SCOPE -> assistant -> " in text and "\n" not in text


def test_closing_the_path_makes_the_same_scope_acceptable() -> None:
    """The assistant may read the scope when nothing outside may read the assistant."""
    rules, flows = compile_checked(
        [
            {**SEALED, "allow_write_to": ["assistant"]},
            {"name": "assistant-is-last", "when": {"role": "assistant"}, "allow_write_to": ["assistant"]},
        ]
    )
    assert not (transitive_closure(rules.table) & rules.safety_forbidden).any()
    assert all("SAFETY_SCOPE" not in flow.key for flow in flows)


def test_a_forbidden_flow_into_the_scope_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="leaks across SAFETY_SCOPE"):
        compile_checked([{"name": "clean", "when": {"bits": ["SAFETY_SCOPE"]}, "allow_read_from": ["system", "user"]}])


def test_contradictions_are_refused_for_training_too() -> None:
    rules = [
        {"name": "a", "when": {"role": "tool"}, "allow_write_to": ["assistant"]},
        {"name": "b", "when": {"role": "assistant"}, "allow_read_from": ["user"]},
    ]
    with pytest.raises(ConfigError, match="rule 'b' .*forbids every such edge"):
        compile_checked(rules)


def test_reachable_is_reflexive_and_transitive() -> None:
    legal = torch.zeros(5, 5, dtype=torch.bool)
    legal[3, 1] = legal[4, 3] = True
    reach = reachable(legal)
    assert reach[4, 1] and reach[0, 0] and not reach[1, 3] and int(reach.sum()) == 5 + 3


def test_checking_rules_loads_no_torch() -> None:
    code = "import sys; import refractor_megatron.distinction.closure; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
