"""``MaskPlan``: the compiled mask of one batch, made once and shared by all layers, passes and recomputations."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from refractor_megatron.distinction.intervals import run_keys
from refractor_megatron.distinction.retrieved import policy_codes
from refractor_megatron.distinction.rules import CompiledRules, token_types
from refractor_megatron.fabric.cache import PLANS_KEPT, Lru
from refractor_megatron.fabric.joint import JointSpace, Policies, SampleKeys, dense_joint, sample_keys
from refractor_megatron.fabric.layout import Layout, build_layout
from refractor_megatron.fabric.spec import WHOLE, ContextPart, MaskSpec, Tier

_SAMPLES_KEPT = 64


@dataclass(frozen=True)
class PlanStats:
    """Counters of one batch, per head and layer, for telemetry; whatever backend runs the mask.

    legal_edges: edges (query, key) that the softmax sees, summaries included; fully_masked_rows: queries without any
    key, whose output is zero; causal_pairs: pairs of dense causal attention over the same lengths.
    """

    legal_edges: int
    fully_masked_rows: int
    causal_pairs: int


@dataclass(frozen=True, eq=False, repr=False)
class MaskPlan:
    """Mask of a batch of records [b, L, >= 4]. Holds the records: their memory is not reused under a cached key.

    part: which rows of the sequence it is for; policies: uint8 [N], of the records that ids name, None without tier C;
    samples: the compiled mask of each sample, one object for equal ones; space: sizes and places of their keys;
    layout_key: equal for plans of equal masks, which share a layout.
    """

    records: torch.Tensor
    rules: CompiledRules
    spec: MaskSpec
    part: ContextPart
    policies: Policies | None
    samples: tuple[SampleKeys, ...]
    space: JointSpace
    layout_key: Hashable
    _dense: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Query rows per sample: its tokens, or the rank's share of them."""
        return self.space.rows

    @property
    def n_far(self) -> int:
        """Keys per sample before the tokens: summaries and retrieved records."""
        return self.space.far

    @property
    def n_tokens(self) -> int:
        """Token keys per sample, those of neighbouring ranks (halos) included."""
        return self.space.tokens

    @property
    def tiers(self) -> dict[Tier, tuple[int, int]]:
        """Range [lo, hi) of each tier in the joint key space."""
        return self.space.tiers()

    @cached_property
    def layout(self) -> Layout:
        """Visits of the block-sparse backend, made when somebody asks: other backends lower ``samples`` themselves."""
        sizes = (self.space.rows, self.space.far, self.space.tokens)
        block = query_block(self.space.length, self.spec.local.window)
        return _layouts.get(self.layout_key, lambda: build_layout(self.samples, *sizes, block))

    @cached_property
    def stats(self) -> PlanStats:
        """Counters; cheap, they need no layout."""
        causal = sum((stop - start) * (start + stop + 1) // 2 for start, stop in self.space.chunks)
        return PlanStats(
            legal_edges=sum(sample.edges for sample in self.samples),
            fully_masked_rows=sum(len(sample.dead) for sample in self.samples),
            causal_pairs=len(self.samples) * causal,
        )

    def dense(self, device: torch.device) -> torch.Tensor:
        """bool [b, rows, n_far + n_tokens] from the elementwise oracle; asserts L <= 2048."""
        if device not in self._dense:
            records = self.records.to(device)
            masks = [dense_joint(sample, self.rules, self.spec, self.part, self.policies) for sample in records]
            self._dense[device] = torch.stack(masks)
        return self._dense[device]


_plans: Lru[MaskPlan] = Lru(PLANS_KEPT)
_samples: Lru[SampleKeys] = Lru(_SAMPLES_KEPT)
_layouts: Lru[Layout] = Lru(PLANS_KEPT)


def plan_for(
    records: torch.Tensor,
    rules: CompiledRules,
    spec: MaskSpec,
    part: ContextPart = WHOLE,
    policies: Policies | None = None,
) -> MaskPlan:
    """The plan of records int32 [b, L, 4 + R] = (document, segment, role, mask_bits, ids of R retrieved records).

    Records are those of the whole sequence, whatever ``part`` of it a rank holds. policies: uint8 [N] of all records
    that ids may name, needed where ``spec.retrieved`` is set. Cached by the identity of the records' memory, see
    ``Lru.of_records``: give each batch its own records.
    """
    key = (rules.digest, spec, part, id(policies))
    return _plans.of_records(records, key, lambda: _build(records, rules, spec, part, policies))


def clear_plans() -> None:
    """Forgets every cached plan (for tests and benchmarks)."""
    for cache in (_plans, _samples, _layouts):
        cache.items.clear()


def _build(
    records: torch.Tensor, rules: CompiledRules, spec: MaskSpec, part: ContextPart, policies: Policies | None
) -> MaskPlan:
    length = records.shape[1]
    keys: list[Hashable] = []
    samples: list[SampleKeys] = []
    for sample in records.detach().cpu().numpy():
        codes = None
        if spec.retrieved is not None:
            assert policies is not None, "retrieved keys need the policies of their records"
            codes = policy_codes(sample, spec.retrieved.chunk, spec.retrieved.fan_in, policies)
        # Runs and policies decide the mask: samples that agree in them (all plain ones, say) share one compilation.
        found_with = b"" if codes is None else codes.tobytes() + token_types(sample).tobytes()
        key = (run_keys(sample, rules).tobytes(), found_with, length, rules.digest, spec, part)
        keys.append(key)
        samples.append(_samples.get(key, partial(sample_keys, sample, rules, spec, part, codes)))
    space = JointSpace.of(spec, part, length)
    return MaskPlan(records, rules, spec, part, policies, tuple(samples), space, tuple(keys))


def query_block(length: int, window: int | None) -> int:
    """Queries per visit. A block of B rows visits B + window - 1 local keys: small windows want small blocks, and 128
    rows are enough to amortise a call (measured: facts on attention, table 1.2; 512 rows waste area)."""
    reach = length if window is None else min(length, window)
    return min(128, max(32, reach // 2 // 32 * 32))
