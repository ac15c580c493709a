"""The edge-by-edge audit knows the mask as the dense oracle does, and finds an edge that should not be there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.distinction.generators import random_records, random_rules
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.fabric.audit import audit_plan, legal_edges
from refractor_megatron.fabric.backends import available, flex, named
from refractor_megatron.fabric.backends.flex_mask import flex_mask
from refractor_megatron.fabric.plan import MaskPlan, plan_for
from refractor_megatron.fabric.spec import WHOLE, ContextPart, MaskSpec, RetrievedSpec, SummarySpec

CHUNK, BLOCK = 16, 8
CPU = torch.device("cpu")
patterns = st.one_of(
    st.builds(LocalPattern, window=st.integers(1, 40)),
    st.just(LocalPattern()),
    st.builds(LocalPattern, kind=st.just("block"), window=st.integers(1, 20)),
    st.builds(
        LocalPattern, kind=st.sampled_from(["dilated", "hybrid"]), window=st.integers(4, 32),
        dilation=st.integers(1, 3), unit=st.sampled_from([1, 4]),
    ),
)  # fmt: skip
summaries = st.none() | st.builds(
    SummarySpec, st.just(BLOCK), st.integers(1, 2), levels=st.integers(1, 2), fanout=st.integers(2, 3)
)
retrieved = st.none() | st.builds(RetrievedSpec, st.just(CHUNK), st.integers(1, 3))


def make_plan(seed: int, spec: MaskSpec, length: int, causal: bool, part: ContextPart = WHOLE) -> MaskPlan:
    rng = np.random.default_rng(seed)
    rules = compile_rules(random_rules(rng, causal=causal))
    policies = rng.integers(0, 4, size=9).astype(np.uint8)
    fan_in = 0 if spec.retrieved is None else spec.retrieved.fan_in
    samples = []
    for _ in range(2):
        ids = rng.integers(-1, 9, size=(-(-length // CHUNK), fan_in)).repeat(CHUNK, axis=0)[:length]
        samples.append(np.concatenate([random_records(rng, length), -np.sort(-ids, axis=1)], axis=1))
    return plan_for(torch.from_numpy(np.stack(samples).astype(np.int32)), rules, spec, part, policies)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.builds(MaskSpec, patterns, summaries, retrieved), st.integers(1, 90), st.booleans())
def test_the_audit_equals_the_dense_oracle_and_so_does_the_layout(
    seed: int, spec: MaskSpec, length: int, causal: bool
) -> None:
    check(make_plan(seed, spec, length, causal))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 16), summaries, retrieved, st.integers(0, 1))
def test_context_parallel_parts_too(
    seed: int, window: int, summary: SummarySpec | None, found: RetrievedSpec | None, rank: int
) -> None:
    spec = MaskSpec(LocalPattern(window=window), summary, found)
    check(make_plan(seed, spec, 4 * CHUNK, True, ContextPart(rank, 2)))


def check(plan: MaskPlan) -> None:
    every = np.arange(plan.length)
    for i, mask in enumerate(plan.dense(CPU).numpy()):
        assert (legal_edges(plan, i, every) == mask).all()
        for name in available():
            seen = named(name, CPU).executed(plan, i, every, CPU)
            assert (seen[:, : mask.shape[1]] == mask).all() and not seen[:, mask.shape[1] :].any(), name
    assert all(audit_plan(plan, 0, name) == 0 for name in available())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.data())
def test_a_widened_interval_is_found(seed: int, data: st.DataObject) -> None:
    spec = MaskSpec(LocalPattern(window=6), SummarySpec(BLOCK, 1))
    plan = make_plan(seed, spec, 60, True)
    sample = plan.samples[0]
    if not len(sample.rows.row):
        return
    at = data.draw(st.integers(0, len(sample.rows.row) - 1))
    row, key = int(sample.rows.row[at]), int(sample.rows.hi[at])
    if key >= plan.n_far + plan.n_tokens or key == plan.n_far:
        return
    follows = at + 1 < len(sample.rows.row) and sample.rows.row[at + 1] == row and sample.rows.lo[at + 1] <= key
    if follows:
        return
    hi = sample.rows.hi.copy()
    hi[at] += 1
    wrong = (replace(sample, rows=replace(sample.rows, hi=hi)), plan.samples[1])
    widened = replace(plan, samples=wrong, layout_key=object())
    for name in ("blocksparse_cpu", "flex"):
        assert audit_plan(widened, 0, name, rows=2 * plan.length) == 1, name


def test_a_batch_of_more_samples_than_audited_rows() -> None:
    plan = plan_for(torch.zeros(3, 20, 4, dtype=torch.int32), compile_rules([]), MaskSpec(LocalPattern(window=6)))
    assert audit_plan(plan, seed=0, rows=2) == 0


def plan_of_its_own() -> MaskPlan:
    """Its tables can be spoiled: they are shared with no other plan, those go by the identity of samples."""
    plan = plan_for(torch.zeros(1, 20, 4, dtype=torch.int32), compile_rules([]), MaskSpec(LocalPattern(window=6)))
    return replace(plan, samples=(replace(plan.samples[0]),))


def test_the_lists_of_tiles_are_read() -> None:
    """What the flex kernel does not visit is not executed, and in a tile listed as full it asks no mask."""
    plan = plan_of_its_own()
    lists, rows = flex_mask(plan, CPU, flex.BLOCK).block_mask, np.arange(20)
    lists.kv_num_blocks.zero_()
    assert not named("flex", CPU).executed(plan, 0, rows, CPU).any()
    assert lists.full_kv_num_blocks is not None
    lists.full_kv_num_blocks.fill_(1)
    assert audit_plan(plan, 0, "flex", rows=20) == 20 * flex.BLOCK - plan.stats.legal_edges


def test_a_key_of_the_padding_is_an_illegal_edge() -> None:
    """The flex kernel's padding keys have scores of zero: reading one would take weight from the others."""
    plan = plan_of_its_own()
    lists = flex_mask(plan, CPU, flex.BLOCK).block_mask
    allowed = lists.mask_mod
    lists.mask_mod = lambda b, h, q, k: allowed(b, h, q, k) | ((q == 7) & (k == 100))
    assert audit_plan(plan, 0, "flex", rows=20) == 1
