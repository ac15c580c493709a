"""Tier C in the mask: which retrieved records a query may read (spec sections 4 and 7.2).

A chunk of tokens retrieves records; the tokens of the *next* chunk may read them (RETRO's chunk shift: nobody reads
what was found with later tokens). Records found with a chunk tell something about every token of it, so, like a
summary, they are visible to a query only if all tokens of that chunk are legal for the query. Beside that, the rules
must let the query's type read a ``data`` token in RET_SCOPE, and the record's own policy holds:

* without ALLOW_TOOLS it is hidden from the tool role and from every token in TOOL_SCOPE;
* without ALLOW_COPY it is hidden from the roles that a model writes (assistant, code, tool).

Ids travel in columns 4.. of the records: those of chunk u stand in its tokens' rows, valid ids first, -1 for none.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from refractor_megatron.distinction.intervals import Intervals, Rows, expanded, merged, stretches
from refractor_megatron.distinction.lowerings import dense_legal
from refractor_megatron.distinction.roles import (
    CALLING_ROLE,
    RETRIEVED_ROLE,
    SCOPE_BITS,
    WRITING_ROLES,
    MaskBit,
    RecordPolicy,
)
from refractor_megatron.distinction.rules import SCOPES, BoolTable, CompiledRules, token_types

#: Code of "no record here" beside the policies 0..3.
_NONE = 4


def retrieved_type(rules: CompiledRules) -> int:
    """Token type of every retrieved record: ``data`` in RET_SCOPE."""
    return rules.roles.index(RETRIEVED_ROLE) * SCOPES + (1 << SCOPE_BITS.index(MaskBit.RET_SCOPE))


def may_read(rules: CompiledRules, role: int, bits: int, policy: int | None) -> bool:
    """The definition: a token of this role and mask bits may read a record of this policy; None stands for no record.

    ``policy_table`` is the same for all types at once.
    """
    if policy is None:
        return False
    name = rules.roles[role]
    if not policy & RecordPolicy.ALLOW_TOOLS and (name == CALLING_ROLE or bits & MaskBit.TOOL_SCOPE):
        return False
    if not policy & RecordPolicy.ALLOW_COPY and name in WRITING_ROLES:
        return False
    scope = sum(1 << i for i, bit in enumerate(SCOPE_BITS) if bits & bit)
    return bool(rules.table[role * SCOPES + scope, retrieved_type(rules)])


def policy_table(rules: CompiledRules) -> BoolTable:
    """bool [T, 5]: a query of this type may read a record of this policy; the last column, no record, is False."""
    types = np.arange(rules.types)
    role, scope = types // SCOPES, types % SCOPES
    in_tool_scope = (scope >> SCOPE_BITS.index(MaskBit.TOOL_SCOPE) & 1).astype(np.bool_)
    calls = in_tool_scope | (role == rules.roles.index(CALLING_ROLE))
    writes = np.isin(role, [rules.roles.index(name) for name in WRITING_ROLES])
    table = np.zeros((rules.types, _NONE + 1), dtype=np.bool_)
    for policy in range(_NONE):
        hidden = np.zeros_like(calls)
        if not policy & RecordPolicy.ALLOW_TOOLS:
            hidden |= calls
        if not policy & RecordPolicy.ALLOW_COPY:
            hidden |= writes
        table[:, policy] = rules.table[:, retrieved_type(rules)] & ~hidden
    return table


def policy_codes(
    records: npt.NDArray[np.integer[Any]], chunk: int, fan_in: int, policies: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """uint8 [chunks, fan_in]: policy of each record that a chunk's tokens may read, 4 where there is none.

    records: [L, 4 + fan_in]; policies: uint8 [N] of the records by id.
    """
    assert records.shape[1] == 4 + fan_in, f"records of {records.shape[1]} columns, {4 + fan_in} expected"
    ids = records[::chunk, 4:]
    assert ids.max(initial=-1) < len(policies), f"record id {ids.max()} of {len(policies)} records"
    return np.where(ids >= 0, policies[np.maximum(ids, 0)], np.uint8(_NONE)).astype(np.uint8)


def retrieved_rows(
    intervals: Intervals,
    records: npt.NDArray[np.integer[Any]],
    rules: CompiledRules,
    chunk: int,
    codes: npt.NDArray[np.uint8],
) -> Rows:
    """Readable retrieved keys of each query row; key r of chunk u is number ``u * fan_in + r``.

    codes: of ``policy_codes``. Rows of one run and type within one chunk are alike, so the work follows those.
    """
    length, fan_in = intervals.length, codes.shape[1]
    table = policy_table(rules)
    _, alike = np.unique(table, axis=0, return_inverse=True)
    change = np.flatnonzero(np.diff(alike.reshape(-1)[token_types(records)])) + 1
    start = np.union1d(np.union1d(intervals.run_lo, change), np.arange(chunk, length, chunk))
    stop = np.append(start[1:], length)
    run = np.searchsorted(intervals.run_lo, start, side="right") - 1
    number = start // chunk
    asked = intervals.wholly_legal(run, (number - 1) * chunk, number * chunk) & (number > 0)
    legal = table[token_types(records[start])[:, None], codes[number]] & asked[:, None]
    piece, first, last = stretches(legal)
    offset = number[piece] * fan_in
    q, lo, hi = expanded(Rows(piece, first + offset, last + offset), start, stop)
    return merged(q, lo, hi)


def dense_retrieved_mask(
    records: torch.Tensor, rules: CompiledRules, chunk: int, policies: npt.NDArray[np.uint8]
) -> torch.Tensor:
    """bool [L, chunks * fan_in] from the definition, elementwise over queries and chunks (the oracle)."""
    legal = dense_legal(records, rules).cpu()
    length, fan_in = records.shape[0], records.shape[1] - 4
    readable = cache(partial(may_read, rules))
    out = torch.zeros(length, -(-length // chunk), fan_in, dtype=torch.bool)
    for q, (_, _, role, bits, *_) in enumerate(records.tolist()):
        u = q // chunk
        if u == 0 or not legal[q, (u - 1) * chunk : u * chunk].all():
            continue
        found = records[u * chunk, 4:].tolist()
        out[q, u] = torch.tensor([readable(role, bits, int(policies[n]) if n >= 0 else None) for n in found])
    return out.reshape(length, -1).to(records.device)
