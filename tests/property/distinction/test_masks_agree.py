"""The lowerings agree edge for edge on arbitrary rules, documents, segments, roles, bits and windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.distinction.closure import transitive_closure
from refractor_megatron.distinction.intervals import compile_intervals
from refractor_megatron.distinction.lowerings import (
    BlockKind,
    block_map,
    dense_block_mask,
    dense_legal,
    dense_mask,
    mask_mod,
)
from refractor_megatron.distinction.roles import ROLES, SCOPE_BITS
from refractor_megatron.distinction.rules import compile_rules
from tests.masks import sliding

BITS = [str(bit.name) for bit in SCOPE_BITS]
role_lists = st.lists(st.sampled_from(ROLES), unique=True)
restrictions = st.fixed_dictionaries({"allow_read_from": role_lists}, optional={"allow_write_to": role_lists}) | (
    st.fixed_dictionaries({"allow_write_to": role_lists}) | st.just({"causal": False})
)
whens = st.fixed_dictionaries({"role": st.sampled_from(ROLES)}) | st.fixed_dictionaries(
    {"bits": st.lists(st.sampled_from(BITS), min_size=1, unique=True)}, optional={"role": st.sampled_from(ROLES)}
)


@st.composite
def rule_sets(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Zero to four valid rules."""
    return [
        {
            "name": f"r{i}",
            "when": draw(whens),
            "causal": draw(st.booleans()),
            **draw(restrictions),
        }
        for i in range(draw(st.integers(0, 4)))
    ]


@st.composite
def record_arrays(draw: st.DrawFn, longest: int = 48) -> npt.NDArray[np.int32]:
    """Runs of (document, segment, role, bits); document -1 is padding."""
    token = st.tuples(st.integers(-1, 2), st.integers(0, 2), st.integers(0, len(ROLES) - 1), st.integers(0, 31))
    runs = draw(st.lists(st.tuples(token, st.integers(1, 9)), min_size=1, max_size=10))
    rows = [token for token, size in runs for _ in range(size)]
    return np.array(rows[:longest], dtype=np.int32)


windows = st.none() | st.integers(1, 60)


@settings(max_examples=100)
@given(record_arrays(), rule_sets(), windows, st.integers(1, 9), st.integers(1, 9))
def test_local_edges(
    records: npt.NDArray[np.int32], raw: list[dict[str, Any]], window: int | None, q_block: int, k_block: int
) -> None:
    rules, length = compile_rules(raw), len(records)
    dense = dense_mask(torch.from_numpy(records), rules, sliding(window)).numpy()
    rows = compile_intervals(records, rules, sliding(window)).rows
    assert (rows.dense(length, 0, length) == dense).all()
    index = torch.arange(length)
    assert (mask_mod(torch.from_numpy(records), rules, sliding(window))(index[:, None], index).numpy() == dense).all()
    tiles = block_map(rows, length, length, q_block, k_block)
    for (i, j), tile in np.ndenumerate(tiles.kind):
        part = dense[i * q_block : (i + 1) * q_block, j * k_block : (j + 1) * k_block]
        assert tiles.edges[i, j] == part.sum()
        assert (tile == BlockKind.FULL) == part.all() and (tile == BlockKind.EMPTY) == (not part.any())


@settings(max_examples=100)
@given(record_arrays(), rule_sets(), windows, st.integers(1, 9), st.integers(1, 3))
def test_summary_edges(
    records: npt.NDArray[np.int32], raw: list[dict[str, Any]], window: int | None, block: int, per_block: int
) -> None:
    rules, length = compile_rules(raw), len(records)
    dense = (
        dense_block_mask(torch.from_numpy(records), rules, sliding(window), block)
        .repeat_interleave(per_block, 1)
        .numpy()
    )
    rows = compile_intervals(records, rules, sliding(window)).summary_rows(block).scaled(per_block)
    assert (rows.dense(length, 0, dense.shape[1]) == dense).all()
    assert (np.diff(rows.row) >= 0).all(), "rows are looked up by bisection"


@settings(max_examples=100)
@given(record_arrays(), rule_sets())
def test_no_edge_breaks_a_class(records: npt.NDArray[np.int32], raw: list[dict[str, Any]]) -> None:
    """Zero illegal edges, class by class, from the words of the specification instead of the tables."""
    rules, length = compile_rules(raw), len(records)
    legal = compile_intervals(records, rules, sliding(None)).rows.dense(length, 0, length)
    names = [{bit for bit, flag in zip(BITS, SCOPE_BITS, strict=True) if bits & flag} for bits in records[:, 3]]
    for q, k in np.argwhere(legal):
        if q == k:
            continue
        document_q, segment_q, role_q, _ = records[q]
        document_k, segment_k, role_k, _ = records[k]
        assert document_q == document_k >= 0
        assert segment_q == segment_k or ROLES[role_k] == "system"
        if k > q:
            assert any(_matches(r, role_q, names[q]) and _matches(r, role_k, names[k]) for r in raw if not r["causal"])
        for rule in raw:
            scope = set(rule["when"].get("bits", ()))
            if scope and scope <= names[q] and scope <= names[k]:
                continue
            if _matches(rule, role_q, names[q]) and rule.get("allow_read_from") is not None:
                assert ROLES[role_k] in rule["allow_read_from"]
            if _matches(rule, role_k, names[k]) and rule.get("allow_write_to") is not None:
                assert ROLES[role_q] in rule["allow_write_to"]


def _matches(rule: dict[str, Any], role: int, bits: set[str]) -> bool:
    when = rule["when"]
    return when.get("role") in (None, ROLES[role]) and set(when.get("bits", ())) <= bits


@settings(max_examples=60)
@given(record_arrays(), rule_sets())
def test_the_type_closure_bounds_the_token_closure(records: npt.NDArray[np.int32], raw: list[dict[str, Any]]) -> None:
    """What check_closure accepts holds for every arrangement of tokens: token flows never leave the type closure."""
    from refractor_megatron.distinction.rules import token_types

    rules = compile_rules(raw)
    legal = dense_legal(torch.from_numpy(records), rules).numpy()
    np.fill_diagonal(legal, False)
    flows = transitive_closure(legal)
    kinds = token_types(records)
    allowed = transitive_closure(rules.table)[kinds[:, None], kinds[None, :]]
    assert not (flows & ~allowed).any()
