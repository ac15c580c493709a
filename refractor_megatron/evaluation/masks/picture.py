"""The compiled mask of a conversation, cell by cell: which tier reads a key, or why none does.

Edges come from the plan that attention itself uses; only the reasons for missing edges are worked out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

from ...distinction.intervals import compile_intervals
from ...distinction.pattern import FULL
from ...distinction.rules import BoolTable, CompiledRules, token_types
from ...fabric.plan import plan_for
from ...fabric.spec import MaskSpec
from .conversation import Conversation


class Cell(IntEnum):
    """What a query has of a key: three reasons for nothing, a legal key that no tier brings, and two tiers."""

    FUTURE = 0
    DOCUMENT = 1
    SEGMENT = 2
    RULE = 3
    UNREAD = 4
    SUMMARY = 5
    LOCAL = 6


@dataclass(frozen=True)
class Picture:
    """cells: uint8 [L, L] of ``Cell``; summary, retrieved: bool [L, keys], far keys that each query reads."""

    conversation: Conversation
    rules: CompiledRules
    spec: MaskSpec
    cells: npt.NDArray[np.uint8]
    summary: BoolTable
    retrieved: BoolTable

    @property
    def length(self) -> int:
        """Cells of the sample, L."""
        return len(self.cells)

    def edges(self) -> dict[str, int]:
        """Number of edges (query, key) of each tier."""
        return {
            "local": int((self.cells == Cell.LOCAL).sum()),
            "summary": int(self.summary.sum()),
            "retrieved": int(self.retrieved.sum()),
        }

    def summary_line(self) -> str:
        """Sizes and edges in one line."""
        counts = ", ".join(f"{count} {tier}" for tier, count in self.edges().items())
        pairs = f"{self.length * (self.length + 1) // 2} causal pairs"
        if not self.rules.causal:
            pairs = f"{self.length**2} pairs in either order"
        return f"{self.length} {self.conversation.unit}; edges: {counts}, of {pairs}"


def compile_picture(conversation: Conversation, rules: CompiledRules, spec: MaskSpec, policy: int = 3) -> Picture:
    """Compiles the mask as attention does. policy: ``RecordPolicy`` bits of every retrieved record of the picture."""
    records = conversation.records
    length = len(records)
    policies = None
    if spec.retrieved is not None:
        fan_in = spec.retrieved.fan_in
        policies = np.full(fan_in, policy, dtype=np.uint8)
        ids = np.tile(np.arange(fan_in, dtype=np.int32), (length, 1))
        ids[: spec.retrieved.chunk] = -1  # no chunk before the first one could have asked
        records = np.concatenate([records, ids], axis=1)
    plan = plan_for(torch.from_numpy(records)[None], rules, spec, policies=policies)
    rows = plan.samples[0].rows
    tiers = {tier: rows.dense(length, lo, hi) for tier, (lo, hi) in plan.tiers.items()}
    cells = _reasons(conversation.records, rules)
    legal = cells == Cell.UNREAD
    brought = _through_summaries(tiers["summary"], spec, length)
    assert not (brought & ~legal).any(), "a summary brings a key that the rules forbid"
    cells[brought] = Cell.SUMMARY
    assert not (tiers["local"] & ~legal).any(), "the local tier reads a key that the rules forbid"
    cells[tiers["local"]] = Cell.LOCAL
    return Picture(conversation, rules, spec, cells, tiers["summary"], tiers["retrieved"])


def _reasons(records: npt.NDArray[np.int32], rules: CompiledRules) -> npt.NDArray[np.uint8]:
    """uint8 [L, L]: UNREAD where the key is legal, else why it is not (the first of document, segment, rule, order)."""
    length = len(records)
    legal = compile_intervals(records, rules, FULL).rows.dense(length, 0, length)
    document, segment, kind = records[:, 0], records[:, 1], token_types(records)
    cells = np.full((length, length), Cell.FUTURE, dtype=np.uint8)
    past = np.tri(length, dtype=np.bool_)
    forbidden = past & ~rules.table[kind[:, None], kind]
    cells[forbidden] = Cell.RULE
    apart = past & (segment[:, None] != segment) & ~rules.shared[kind]
    cells[apart] = Cell.SEGMENT
    other = past & (document[:, None] != document)
    cells[other] = Cell.DOCUMENT
    assert (legal | forbidden | apart | other | ~past).all(), "an edge is missing without a reason"
    cells[legal] = Cell.UNREAD
    return cells


def _through_summaries(seen: BoolTable, spec: MaskSpec, length: int) -> BoolTable:
    """bool [L, L]: tokens that a query reads inside a summary; seen: bool [L, level-2 + level-1 summaries]."""
    brought = np.zeros((length, length), dtype=np.bool_)
    if spec.summary is None:
        return brought
    per_block = spec.summary.per_block
    level2 = spec.summary.counts(length)[0]
    sizes = [spec.summary.block_size * spec.summary.fanout] * (level2 // per_block)
    sizes += [spec.summary.block_size] * (seen.shape[1] // per_block - len(sizes))
    first = 0
    for number, size in enumerate(sizes):
        if number == level2 // per_block:
            first = 0
        brought[:, first : first + size] |= seen[:, number * per_block, None]
        first += size
    return brought
