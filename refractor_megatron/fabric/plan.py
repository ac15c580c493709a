"""``MaskPlan``: the compiled mask of one batch, made once and shared by all layers, passes and recomputations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from refractor_megatron.distinction.intervals import compile_intervals, run_keys
from refractor_megatron.distinction.lowerings import dense_mask, dense_summary_mask
from refractor_megatron.distinction.rules import CompiledRules
from refractor_megatron.fabric.layout import Layout, SampleKeys, build_layout, sample_keys

_Value = TypeVar("_Value")

#: Plans kept: more than the micro-batches in flight in one pipeline stage of a common schedule.
PLANS_KEPT = 8
_SAMPLES_KEPT = 64


class _Lru(Generic[_Value]):
    """Least-recently-used dictionary of fixed size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: OrderedDict[Hashable, _Value] = OrderedDict()

    def get(self, key: Hashable) -> _Value | None:
        value = self.items.get(key)
        if value is not None:
            self.items.move_to_end(key)
        return value

    def put(self, key: Hashable, value: _Value) -> _Value:
        self.items[key] = value
        if len(self.items) > self.size:
            self.items.popitem(last=False)
        return value


@dataclass(frozen=True)
class PlanStats:
    """Counters of one batch, per head and layer, for telemetry.

    legal_edges: edges (query, key) that the softmax sees, summaries included; visited_pairs: pairs that the
    block-sparse backend computes; fully_masked_rows: queries without any key, whose output is zero; causal_pairs:
    pairs of dense causal attention over the same lengths.
    """

    legal_edges: int
    visited_pairs: int
    fully_masked_rows: int
    causal_pairs: int


@dataclass(frozen=True, eq=False, repr=False)
class MaskPlan:
    """Mask of a batch of records [b, L, 4]. Holds the records, so their memory cannot be reused under a cached key."""

    records: torch.Tensor
    rules: CompiledRules
    window: int | None
    block_size: int | None
    summaries_per_block: int
    layout: Layout
    stats: PlanStats
    _dense: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens per sample, L."""
        return self.layout.length

    @property
    def n_summaries(self) -> int:
        """Summary keys per sample, (L // block_size) * S; 0 when tier B is off."""
        return self.layout.n_summaries

    def dense(self, device: torch.device) -> torch.Tensor:
        """bool [b, L, n_summaries + L] from the elementwise oracle; asserts L <= 2048."""
        if device not in self._dense:
            self._dense[device] = torch.stack([self._dense_sample(sample) for sample in self.records.to(device)])
        return self._dense[device]

    def _dense_sample(self, records: torch.Tensor) -> torch.Tensor:
        local = dense_mask(records, self.rules, self.window)
        if self.block_size is None:
            return local
        summaries = dense_summary_mask(records, self.rules, self.window, self.block_size, self.summaries_per_block)
        return torch.cat([summaries, local], dim=1)


_plans: _Lru[MaskPlan] = _Lru(PLANS_KEPT)
_samples: _Lru[SampleKeys] = _Lru(_SAMPLES_KEPT)
_layouts: _Lru[Layout] = _Lru(PLANS_KEPT)


def plan_for(
    records: torch.Tensor, rules: CompiledRules, window: int | None, block_size: int | None, summaries_per_block: int
) -> MaskPlan:
    """The plan of records int32 [b, L, 4] = (document, segment, role, mask_bits).

    window: tokens a query looks back, itself included, None = all; block_size None or summaries_per_block 0 turn the
    summaries off. Cached by the identity of the records' memory (address, shape, version counter): detached aliases,
    as activation recomputation makes them, hit; writing into the records through torch misses and recompiles. Writing
    behind torch's back, through a numpy array that shares the memory, is not seen: give each batch its own records.
    """
    assert records.dim() == 3 and records.shape[2] == 4 and records.shape[0] > 0 and records.shape[1] > 0, records.shape
    assert not records.is_floating_point(), records.dtype
    if block_size is None or summaries_per_block == 0:
        block_size, summaries_per_block = None, 0
    if records.is_inference():
        # No version counter, so no way to see a write.
        return _build(records, rules, window, block_size, summaries_per_block)
    place = (records.device, records.data_ptr(), tuple(records.shape), records.stride(), records.dtype)
    key = (place, records._version, rules.digest, window, block_size, summaries_per_block)
    return _plans.get(key) or _plans.put(key, _build(records, rules, window, block_size, summaries_per_block))


def clear_plans() -> None:
    """Forgets every cached plan (for tests and benchmarks)."""
    for cache in (_plans, _samples, _layouts):
        cache.items.clear()


def _build(
    records: torch.Tensor, rules: CompiledRules, window: int | None, block_size: int | None, per_block: int
) -> MaskPlan:
    batch, length, _ = records.shape
    columns = records.detach().cpu().numpy()
    keys: list[Hashable] = []
    samples: list[SampleKeys] = []
    for sample in columns:
        # The run structure decides the mask: equal structures (all plain samples, say) share one compilation.
        key = (run_keys(sample, rules).tobytes(), length, rules.digest, window, block_size, per_block)
        found = _samples.get(key)
        if found is None:
            found = _samples.put(key, sample_keys(compile_intervals(sample, rules, window), block_size, per_block))
        keys.append(key)
        samples.append(found)
    layout = _layouts.get(tuple(keys))
    if layout is None:
        n_summaries = 0 if block_size is None else length // block_size * per_block
        layout = build_layout(samples, length, n_summaries, query_block(length, window))
        _layouts.put(tuple(keys), layout)
    stats = PlanStats(
        legal_edges=layout.legal_edges,
        visited_pairs=layout.visited_pairs,
        fully_masked_rows=layout.fully_masked_rows,
        causal_pairs=batch * length * (length + 1) // 2,
    )
    return MaskPlan(records, rules, window, block_size, per_block, layout, stats)


def query_block(length: int, window: int | None) -> int:
    """Queries per visit. A block of B rows visits B + window - 1 local keys: small windows want small blocks, and 128
    rows are enough to amortise a call (measured: facts on attention, table 1.2; 512 rows waste area)."""
    reach = length if window is None else min(length, window)
    return min(128, max(32, reach // 2 // 32 * 32))
