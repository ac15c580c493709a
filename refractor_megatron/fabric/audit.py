"""Illegal edges of an executed mask, counted edge by edge on sampled query rows.

A backend computes what a layout or tables of its own say, and these follow the interval form. Here they are read back
for some rows (``Backend.executed``: visits, block lists, bit tiles), and each edge is judged again, elementwise, from
the definition of the mask: ``mask_mod`` for tokens and for every token under a summary or behind a retrieved record.
The count of edges let through but illegal must be 0.
"""

from __future__ import annotations

import numpy as np
import torch

from refractor_megatron.distinction.intervals import IntArray
from refractor_megatron.distinction.lowerings import mask_mod
from refractor_megatron.distinction.pattern import FULL
from refractor_megatron.distinction.retrieved import may_read
from refractor_megatron.distinction.rules import BoolTable
from refractor_megatron.fabric.backends import named
from refractor_megatron.fabric.joint import JointSpace
from refractor_megatron.fabric.plan import MaskPlan
from refractor_megatron.fabric.sampling import sampled_rows
from refractor_megatron.fabric.spec import RetrievedSpec, SummarySpec

#: Query rows audited in a batch.
AUDITED_ROWS = 64
_CPU = torch.device("cpu")


def audit_plan(
    plan: MaskPlan, seed: int, backend: str = "auto", device: torch.device = _CPU, rows: int = AUDITED_ROWS
) -> int:
    """Illegal edges among those that ``backend`` lets through on ``rows`` rows of the batch, chosen by ``seed``.

    device: where the backend executes the plan. Errors: ``CapabilityError`` for an unknown backend.
    """
    executed, batch, found = named(backend, device).executed, len(plan.samples), 0
    for i in range(batch):
        mine = rows * (i + 1) // batch - rows * i // batch
        chosen = sampled_rows(mine, plan.space, seed + i)
        if len(chosen):
            seen, legal = executed(plan, i, chosen, device), legal_edges(plan, i, chosen)
            found += int(seen.sum() - (seen[:, : legal.shape[1]] & legal).sum())  # padding has no legal edge
    return found


def legal_edges(plan: MaskPlan, sample: int, rows: IntArray) -> BoolTable:
    """bool [len(rows), n_far + n_tokens]: the joint keys that the definition of the mask lets each row read."""
    records, spec, space = plan.records[sample].detach().cpu(), plan.spec, plan.space
    position = np.concatenate([np.arange(start, stop) for start, stop in space.chunks])[rows]
    q, token = torch.from_numpy(position)[:, None], torch.arange(len(records))[None]
    legal = mask_mod(records, plan.rules, FULL)(q, token).numpy()  # [rows, L], pattern ignored
    near: BoolTable = spec.local.allows(q, token).numpy()
    tiers = {"local": _tokens(legal & near, space, rows)}
    if spec.summary is not None:
        tiers["summary"] = _summaries(legal, near, position, spec.summary)
    if spec.retrieved is not None:
        tiers["retrieved"] = _retrieved(plan, sample, legal, position, spec.retrieved)
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


def _retrieved(plan: MaskPlan, sample: int, legal: BoolTable, q: IntArray, spec: RetrievedSpec) -> BoolTable:
    """[rows, retrieved keys]: of the row's own chunk, if it may read all of the chunk that they were found with."""
    assert plan.policies is not None
    records, space = plan.records[sample].detach().cpu().numpy(), plan.space
    out = np.zeros((len(q), space.retrieved), dtype=np.bool_)
    for (start, stop), offset in zip(space.chunks, space.retrieved_offsets(spec), strict=True):
        for i in np.flatnonzero((q >= start) & (q < stop) & (q >= spec.chunk)):
            chunk = q[i] // spec.chunk
            if legal[i, (chunk - 1) * spec.chunk : chunk * spec.chunk].all():
                _, _, role, bits, *ids = records[q[i]].tolist()
                at = offset - space.summaries + chunk * spec.fan_in
                policies = (int(plan.policies[n]) if n >= 0 else None for n in ids)
                out[i, at : at + spec.fan_in] = [may_read(plan.rules, role, bits, policy) for policy in policies]
    return out
