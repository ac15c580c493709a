"""``LinearPlan``: the bucket of each token, and the running states that each chunk of queries adds up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from refractor_megatron.distinction.intervals import IntArray, Records, run_keys
from refractor_megatron.distinction.rules import BoolTable, CompiledRules, token_types
from refractor_megatron.errors import ConfigError
from refractor_megatron.fabric.cache import PLANS_KEPT, Lru

#: Tokens of a chunk: inside it the quadratic form is used, between chunks the states.
CHUNK = 128
#: (chunk, bucket) states made at a time. More of them make fewer, larger products, and more memory.
_STATES = 32


@dataclass(frozen=True, eq=False, repr=False)
class Panel:
    """K consecutive chunks that are computed together; U is the largest number of buckets in one of them.

    A *slot* numbers the buckets of a chunk. The states in reach are the K * U of the panel's own slots, then the G
    carried into it.

    tokens: at most K * CHUNK; slot: int64 [b, K, CHUNK], -1 for padding; within: bool [b, K, U, U], slot reads slot,
    causality apart; reads: bool [b, K * U, K * U + G], what a slot reads, earlier chunks only; carry: bool
    [b, G', K * U + G], the states in reach that make up each state carried on.
    """

    tokens: int
    slot: torch.Tensor
    within: torch.Tensor
    reads: torch.Tensor
    carry: torch.Tensor


@dataclass(frozen=True, eq=False, repr=False)
class LinearPlan:
    """Plan of a batch of records [b, L, >= 4]; holds them, so their memory cannot be reused under a cached key."""

    records: torch.Tensor
    rules: CompiledRules
    panels: tuple[Panel, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Buckets:
    """Buckets of one sample, each of some document, segment and token type (any one of its class): int64 [n].

    An entry with document -1 is no bucket: nobody reads it and it reads nobody.
    """

    document: IntArray
    segment: IntArray
    kind: IntArray

    def readable(self, query: IntArray, key: IntArray, rules: CompiledRules) -> BoolTable:
        """Whether bucket ``query`` may read bucket ``key`` (elementwise, broadcast), causality apart."""
        document, segment, kind = self.document[key], self.segment[key], self.kind[key]
        legal: BoolTable = rules.table[self.kind[query], kind] & (document == self.document[query]) & (document >= 0)
        legal &= (segment == self.segment[query]) | rules.shared[kind]
        return legal


@dataclass(frozen=True, eq=False, repr=False)
class _Sample:
    """One sample by chunks.

    buckets: the last entry is no bucket, so that the number -1 means that; dies: int64 [n], first position behind every
    token that could read the bucket: the end of its segment, or of its document where its role is shared;
    slot: int64 [chunks, CHUNK] of each token; bucket: int64 [chunks, U] of each slot; used: int64 [chunks] slots.
    """

    buckets: Buckets
    dies: IntArray
    slot: IntArray
    bucket: IntArray
    used: IntArray


_plans: Lru[LinearPlan] = Lru(PLANS_KEPT)


def linear_plan_for(records: torch.Tensor, rules: CompiledRules, device: torch.device | None = None) -> LinearPlan:
    """The plan of records int32 [b, L, >= 4] = (document, segment, role, mask_bits, ...); further columns are ignored.

    device: where the tables of the plan are wanted; the records' own by default. Cached by the identity of the
    records' memory, see ``Lru.of_records``.
    Errors: ``ConfigError`` when a rule lets tokens read later ones, which running states cannot do.
    """
    require_causal(rules)
    where = device or records.device
    return _plans.of_records(records, (rules.digest, where), lambda: _build(records, rules, where))


def require_causal(rules: CompiledRules) -> None:
    """Refuses rules with ``causal: false``."""
    if not rules.causal:
        names = " and ".join(map(repr, rules.noncausal_rules()))
        raise ConfigError(
            f"relation.linear_mode reads earlier tokens only, but safety.masks rule {names} has causal: false; set it "
            "to true, or relation.linear_mode.enabled to false."
        )


def _build(records: torch.Tensor, rules: CompiledRules, device: torch.device) -> LinearPlan:
    length = records.shape[1]
    samples = [_chunked(columns[:, :4], rules) for columns in records.detach().cpu().numpy()]
    used = np.max([sample.used for sample in samples], axis=0)
    bounds = _panel_bounds(used)
    panels = []
    by_panel = zip(*(_panel_tables(sample, bounds, used, rules) for sample in samples), strict=True)
    for first, last, tables in zip(bounds[:-1], bounds[1:], by_panel, strict=True):
        # Samples carry different numbers of states: the missing ones are lanes that nothing fills and nobody reads.
        slot, within, reads, carry = (_stacked(parts, device) for parts in zip(*tables, strict=True))
        panels.append(Panel(min(last * CHUNK, length) - first * CHUNK, slot, within, reads, carry))
    return LinearPlan(records, rules, tuple(panels))


def _chunked(records: Records, rules: CompiledRules) -> _Sample:
    """Numbers the buckets of one sample's records [L, 4], and their slots in each chunk."""
    length, chunks = len(records), -(-len(records) // CHUNK)
    runs = run_keys(records, rules)
    size = np.diff(np.append(runs[:, 0], length))
    real = runs[:, 1] >= 0
    names, example, number = np.unique(runs[real, 1:], axis=0, return_index=True, return_inverse=True)
    of_run = np.full(len(runs), -1)
    of_run[real] = number.reshape(-1)
    end = runs[real, 0] + size[real]
    kind = token_types(records[runs[real, 0][example]]).astype(np.int64)
    dies = np.where(rules.shared[kind], _last(names[:, :1], number, end), _last(names[:, :2], number, end))
    buckets = Buckets(np.append(names[:, 0], -1), np.append(names[:, 1], -1), np.append(kind, 0))

    token = np.full(chunks * CHUNK, -1)
    token[:length] = np.repeat(of_run, size)
    here = np.flatnonzero(token >= 0)
    found, slot_of = np.unique(here // CHUNK * (len(names) + 1) + token[here], return_inverse=True)
    chunk, bucket = np.divmod(found, len(names) + 1)
    slot_of_found = np.arange(len(found)) - np.searchsorted(chunk, chunk)
    used = np.bincount(chunk, minlength=chunks)
    slot = np.full(chunks * CHUNK, -1)
    slot[here] = slot_of_found[slot_of]
    table = np.full((chunks, max(1, used.max())), -1)
    table[chunk, slot_of_found] = bucket
    return _Sample(buckets, dies, slot.reshape(chunks, CHUNK), table, used)


def _last(names: IntArray, number: IntArray, end: IntArray) -> IntArray:
    """For each bucket, the end of the last run among all buckets that share its row of ``names``."""
    _, group = np.unique(names, axis=0, return_inverse=True)
    group = group.reshape(-1)
    last = np.zeros(len(names), dtype=np.int64)
    np.maximum.at(last, group[number], end)
    return last[group]


def _panel_bounds(used: IntArray) -> list[int]:
    """First chunk of each panel, and the number of chunks: K * U <= _STATES, one chunk at least."""
    bounds, widest = [0], 1
    for chunk, slots in enumerate(used.tolist()):
        widest = max(widest, slots)
        if (chunk + 1 - bounds[-1]) * widest > _STATES and chunk > bounds[-1]:
            bounds.append(chunk)
            widest = max(1, slots)
    return [*bounds, len(used)]


def _panel_tables(
    sample: _Sample, bounds: Sequence[int], used: IntArray, rules: CompiledRules
) -> list[tuple[IntArray, BoolTable, BoolTable, BoolTable]]:
    """(slot, within, reads, carry) of each panel for one sample, with the sample's own numbers of carried states."""
    carried = np.zeros(0, dtype=np.int64)
    tables = []
    for first, last in zip(bounds, bounds[1:], strict=False):
        slots = max(1, int(used[first:last].max()))
        bucket = np.full((last - first, slots), -1)
        width = min(slots, sample.bucket.shape[1])
        bucket[:, :width] = sample.bucket[first:last, :width]
        within = sample.buckets.readable(bucket[:, :, None], bucket[:, None, :], rules)
        own = bucket.reshape(-1)
        reach = np.append(own, carried)
        chunk = np.repeat(np.arange(last - first), slots)
        earlier = np.append(chunk, np.full(len(carried), -1)) < chunk[:, None]
        reads = sample.buckets.readable(own[:, None], reach, rules) & earlier
        known = np.unique(reach[reach >= 0])
        carried = known[sample.dies[known] > last * CHUNK]
        tables.append((sample.slot[first:last], within, reads, carried[:, None] == reach))
    return tables


def _stacked(parts: Sequence[npt.NDArray[np.generic]], device: torch.device) -> torch.Tensor:
    """Stacks tables of one rank; smaller ones are filled up with False at the end of each dimension."""
    shape = np.max([part.shape for part in parts], axis=0)
    out = np.zeros((len(parts), *shape), dtype=parts[0].dtype)
    for row, part in zip(out, parts, strict=True):
        row[tuple(slice(size) for size in part.shape)] = part
    return torch.from_numpy(out).to(device)
