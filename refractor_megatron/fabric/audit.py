"""Illegal edges of an executed mask, counted edge by edge on sampled query rows.

What a backend computes follows the layout or tables of its own, and both follow the interval form. Here layout and
intervals are read back for some rows and each edge is judged again, elementwise, from the definition of the mask:
``mask_mod`` for tokens and for every token under a summary or behind a retrieved record. The count of edges let through
but illegal must be 0.
"""

from __future__ import annotations

import numpy as np
import torch

from refractor_megatron.distinction.intervals import IntArray
from refractor_megatron.distinction.lowerings import mask_mod
from refractor_megatron.distinction.pattern import FULL
from refractor_megatron.distinction.roles import (
    CALLING_ROLE,
    RETRIEVED_ROLE,
    SCOPE_BITS,
    WRITING_ROLES,
    MaskBit,
    RecordPolicy,
)
from refractor_megatron.distinction.rules import SCOPES, BoolTable, CompiledRules
from refractor_megatron.fabric.joint import JointSpace
from refractor_megatron.fabric.plan import MaskPlan
from refractor_megatron.fabric.sampling import sampled_rows, select_rows
from refractor_megatron.fabric.spec import RetrievedSpec, SummarySpec

#: Query rows audited in a batch.
AUDITED_ROWS = 64


def audit_plan(plan: MaskPlan, seed: int, rows: int = AUDITED_ROWS) -> int:
    """Illegal edges among those that ``plan.layout`` lets through on ``rows`` rows of the batch, chosen by ``seed``."""
    batch = len(plan.samples)
    found = 0
    for i in range(batch):
        mine = rows * (i + 1) // batch - rows * i // batch
        chosen = sampled_rows(mine, plan.space, seed + i)
        found += int((executed_edges(plan, i, chosen) & ~legal_edges(plan, i, chosen)).sum())
    return found


def executed_edges(plan: MaskPlan, sample: int, rows: IntArray) -> BoolTable:
    """bool [len(rows), n_far + n_tokens]: the joint keys that each of the ascending ``rows`` of a sample is let read,
    by the visits of the layout or by the intervals from which every backend makes its own tables.
    """
    layout, keys = plan.layout, plan.n_far + plan.n_tokens
    out = select_rows(plan.samples[sample].rows, rows).dense(len(rows), 0, keys)
    for index, visit in enumerate(layout.visits):
        inside = np.flatnonzero((rows >= visit.first) & (rows < visit.last))
        if not len(inside) or not visit.samples[0] <= sample < visit.samples[1]:
            continue
        legal = layout.legal(index)
        table = 0 if len(legal) == 1 else sample - visit.samples[0]
        ranges = [*visit.far, *((lo + plan.n_far, hi + plan.n_far) for lo, hi in visit.tokens)]
        columns = np.concatenate([np.arange(lo, hi) for lo, hi in ranges])
        out[np.ix_(inside, columns)] |= legal[table][rows[inside] - visit.first]
    return out


def legal_edges(plan: MaskPlan, sample: int, rows: IntArray) -> BoolTable:
    """bool [len(rows), n_far + n_tokens]: the joint keys that the definition of the mask lets each row read."""
    records, spec = plan.records[sample].detach().cpu(), plan.spec
    length = len(records)
    space = JointSpace.of(spec, plan.part, length)
    position = np.concatenate([np.arange(start, stop) for start, stop in space.chunks])[rows]
    q, token = torch.from_numpy(position)[:, None], torch.arange(length)[None]
    legal = mask_mod(records, plan.rules, FULL)(q, token).numpy()  # [rows, L], pattern ignored
    near: BoolTable = spec.local.allows(q, token).numpy()
    tiers = {"local": _tokens(legal & near, space, rows)}
    if spec.summary is not None:
        tiers["summary"] = _summaries(legal, near, position, spec.summary)
    if spec.retrieved is not None:
        tiers["retrieved"] = _retrieved(plan, sample, legal, position, spec.retrieved, space)
    return np.concatenate([tiers[tier] & (tier in spec.tiers) for tier in spec.present], axis=1)


def _tokens(legal: BoolTable, space: JointSpace, rows: IntArray) -> BoolTable:
    """[rows, L] -> [rows, tokens]: a key serves the rows of the chunk that it was fetched for."""
    parts, at = [], 0
    for start, stop in space.chunks:
        token = np.arange(start - space.halo, stop)
        own = (rows >= at) & (rows < at + stop - start)
        parts.append(legal[:, np.maximum(token, 0)] & (token >= 0) & own[:, None])
        at += stop - start
    return np.concatenate(parts, axis=1)


def _summaries(legal: BoolTable, near: BoolTable, q: IntArray, spec: SummarySpec) -> BoolTable:
    """[rows, level-2 + level-1 summaries]."""
    blocks = _whole_blocks(legal, near, q, spec.block_size, behind=0)
    if spec.levels == 1:
        return blocks.repeat(spec.per_block, axis=1)
    groups = _whole_blocks(legal, near, q, spec.block_size * spec.fanout, behind=1)
    replaced = groups.repeat(spec.fanout, axis=1)
    blocks[:, : replaced.shape[1]] &= ~replaced
    return np.concatenate([groups, blocks], axis=1).repeat(spec.per_block, axis=1)


def _whole_blocks(legal: BoolTable, near: BoolTable, q: IntArray, size: int, behind: int) -> BoolTable:
    """[rows, L // size]: complete, with ``behind`` whole blocks between, wholly legal, and not read token by token."""
    count = legal.shape[1] // size
    shape = (len(q), count, size)
    whole = legal[:, : count * size].reshape(shape).all(2) & ~near[:, : count * size].reshape(shape).all(2)
    return whole & (np.arange(count) < (q // size - behind)[:, None])


def _retrieved(
    plan: MaskPlan, sample: int, legal: BoolTable, q: IntArray, spec: RetrievedSpec, space: JointSpace
) -> BoolTable:
    """[rows, retrieved keys]: of the row's own chunk, if it may read all of the chunk that they were found with."""
    assert plan.policies is not None
    records = plan.records[sample].detach().cpu().numpy()
    out = np.zeros((len(q), space.retrieved), dtype=np.bool_)
    first = 0
    for start, stop in space.chunks:
        for i in np.flatnonzero((q >= start) & (q < stop) & (q >= spec.chunk)):
            chunk = q[i] // spec.chunk
            if legal[i, (chunk - 1) * spec.chunk : chunk * spec.chunk].all():
                _, _, role, bits, *ids = records[q[i]].tolist()
                at = first + (chunk - start // spec.chunk) * spec.fan_in
                policies = (RecordPolicy(int(plan.policies[n])) if n >= 0 else None for n in ids)
                out[i, at : at + spec.fan_in] = [_may_read(plan.rules, role, bits, policy) for policy in policies]
        first += -(-(stop - start) // spec.chunk) * spec.fan_in
    return out


def _may_read(rules: CompiledRules, role: int, bits: int, policy: RecordPolicy | None) -> bool:
    """Whether a token may read a retrieved record of ``policy``; None stands for no record."""
    if policy is None:
        return False
    name = rules.roles[role]
    if not policy & RecordPolicy.ALLOW_TOOLS and (name == CALLING_ROLE or bits & MaskBit.TOOL_SCOPE):
        return False
    if not policy & RecordPolicy.ALLOW_COPY and name in WRITING_ROLES:
        return False
    scope = sum(1 << i for i, bit in enumerate(SCOPE_BITS) if bits & bit)
    record = rules.roles.index(RETRIEVED_ROLE) * SCOPES + (1 << SCOPE_BITS.index(MaskBit.RET_SCOPE))
    return bool(rules.table[role * SCOPES + scope, record])
