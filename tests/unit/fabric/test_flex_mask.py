"""The flex lowering: block lists, mask functions and padding say exactly what the plan says; sharing and lifetimes."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refractor_megatron.distinction.generators import random_records, random_rules
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.fabric import plan_for
from refractor_megatron.fabric.backends import flex_mask as lowering
from refractor_megatron.fabric.backends.flex_mask import FlexMask, Geometry, flex_mask
from refractor_megatron.fabric.plan import MaskPlan, clear_plans
from refractor_megatron.fabric.spec import MaskSpec, RetrievedSpec, SummarySpec
from tests.masks import spec_of

CPU = torch.device("cpu")
PLAIN = compile_rules([])

LOCAL = st.sampled_from(
    [
        LocalPattern(),
        LocalPattern(window=1),
        LocalPattern(window=70),
        LocalPattern("dilated", window=64, dilation=3, unit=1),
        LocalPattern("dilated", window=96, dilation=2, unit=32),
        LocalPattern("hybrid", window=96, dilation=2, unit=16),
        LocalPattern("block", window=48),
    ]
)
SUMMARY = st.none() | st.builds(
    SummarySpec, st.integers(3, 40), st.integers(1, 3), levels=st.integers(1, 2), fanout=st.just(2)
)
RETRIEVED = st.none() | st.builds(RetrievedSpec, st.sampled_from([16, 32]), st.just(3))


def plain_plan(batch: int = 1, length: int = 300, window: int | None = 70) -> MaskPlan:
    return plan_for(torch.zeros(batch, length, 4, dtype=torch.int32), PLAIN, spec_of(window, 32, 2))


def random_plan(seed: int, batch: int, length: int, spec: MaskSpec) -> MaskPlan:
    rng = np.random.default_rng(seed)
    records = np.stack([random_records(rng, length) for _ in range(batch)])
    if spec.retrieved is None:
        return plan_for(torch.from_numpy(records), compile_rules(random_rules(rng)), spec)
    fan_in = spec.retrieved.fan_in
    ids = np.repeat(
        rng.integers(0, 6, size=(batch, -(-length // spec.retrieved.chunk), fan_in)), spec.retrieved.chunk, 1
    )
    ids[:, :, rng.integers(0, fan_in + 1) :] = -1
    records = np.concatenate([records, ids[:, :length].astype(np.int32)], axis=2)
    policies = rng.integers(0, 4, size=6).astype(np.uint8)
    return plan_for(torch.from_numpy(records), compile_rules(random_rules(rng)), spec, policies=policies)


def visited(mask: FlexMask) -> Tensor:
    """bool [samples, padded_rows, padded_keys]: what the kernel computes, from its lists and ``mask_mod``."""
    joint, lists = mask.geometry, mask.block_mask
    q, k = torch.arange(joint.padded_rows)[:, None], torch.arange(joint.padded_keys)[None]
    found = []
    for sample in range(lists.kv_indices.shape[0]):
        legal = lists.mask_mod(torch.tensor(sample), torch.tensor(0), q, k)
        seen = torch.zeros_like(legal)
        kinds = (
            (lists.kv_num_blocks, lists.kv_indices, legal),
            (lists.full_kv_num_blocks, lists.full_kv_indices, None),
        )
        for counts, indices, allowed in kinds:
            for row, count in enumerate(counts[sample, 0].tolist()):
                for column in indices[sample, 0, row, :count].tolist():
                    tile = tuple(slice(i * joint.block, (i + 1) * joint.block) for i in (row, column))
                    seen[tile] = allowed[tile]
        assert torch.equal(seen, legal), "mask_mod and the block lists differ"  # a dense evaluation relies on it
        found.append(seen)
    return torch.stack(found)


def assert_equal_to_oracle(mask: FlexMask, plan: MaskPlan) -> None:
    joint, seen = mask.geometry, visited(mask)
    tokens = seen[:, : plan.length, joint.first_token : joint.first_token + plan.n_tokens]
    assert torch.equal(torch.cat([seen[:, : plan.length, : plan.n_far], tokens], 2), plan.dense(CPU)[: len(seen)])
    assert int(seen.sum()) == int(plan.dense(CPU)[: len(seen)].sum()), "padding is read"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    length=st.integers(1, 300),
    block=st.sampled_from([32, 64, 128]),
    sizes=st.sampled_from([lowering.INTERVALS, ()]),  # without interval tables every mask takes bit tiles
    local=LOCAL,
    summary=SUMMARY,
    retrieved=RETRIEVED,
)
def test_the_lowering_equals_the_oracle(
    seed: int,
    batch: int,
    length: int,
    block: int,
    sizes: tuple[int, ...],
    local: LocalPattern,
    summary: SummarySpec | None,
    retrieved: RetrievedSpec | None,
) -> None:
    plan = random_plan(seed, batch, length, MaskSpec(local, summary, retrieved))
    geometry = Geometry(plan.length, plan.n_far, plan.n_tokens, block)
    mask = lowering.lower(plan.samples, batch, geometry, CPU, sizes)
    assert_equal_to_oracle(mask, plan)


def test_one_lowering_serves_equal_samples() -> None:
    plan = plain_plan(batch=3)
    mask = flex_mask(plan, CPU, 128)
    assert mask.block_mask.kv_indices.shape[0] == 1 and mask.shape_class == ("intervals", 2, 1)
    assert_equal_to_oracle(mask, plan)
    lists = mask.block_mask
    assert mask.partial_tiles == 3 * int(lists.kv_num_blocks.sum())
    assert mask.full_tiles == 3 * int(lists.full_kv_num_blocks.sum())
    assert mask.visited_pairs == (mask.partial_tiles + mask.full_tiles) * 128**2


def test_the_transposed_lists_of_the_backward_pass() -> None:
    plan = random_plan(3, 2, 300, MaskSpec(LocalPattern(window=70), SummarySpec(16, 2)))
    lists = flex_mask(plan, CPU, 32).block_mask
    for prefix in ("", "full_"):
        pairs = []
        for side in ("kv", "q"):
            count, index = (getattr(lists, f"{prefix}{side}_{name}") for name in ("num_blocks", "indices"))
            listed = torch.arange(index.shape[-1]) < count[..., None]
            sample, _, row, at = listed.nonzero(as_tuple=True)
            pairs.append(torch.stack([sample, row, index[sample, 0, row, at].long()]))
        assert torch.equal(torch.unique(pairs[0], dim=1), torch.unique(pairs[1][[0, 2, 1]], dim=1))


def test_the_kernel_sees_contiguous_lists() -> None:
    """It finds sample z at ``z * stride(1)`` of each list: dimension 1 has size 1, and numpy would leave stride 0."""
    mask = flex_mask(random_plan(5, 3, 400, spec_of(50, 16, 2)), CPU, 128)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        for each in (getattr(mask.block_mask, name), getattr(mask.block_mask, name.replace("kv", "q"))):
            assert each.stride() == torch.empty(each.shape).stride() and each.dtype == torch.int32, name


@pytest.mark.parametrize("rows, n_far, n_tokens, block", [(1, 0, 1, 128), (300, 18, 300, 128), (130, 256, 260, 64)])
def test_geometry(rows: int, n_far: int, n_tokens: int, block: int) -> None:
    joint = Geometry(rows, n_far, n_tokens, block)
    assert joint.first_token % block == 0 and 0 <= joint.first_token - n_far < block
    assert joint.padded_keys % max(128, block) == 0 and joint.padded_rows % max(128, block) == 0
    q, k = torch.randn(2, 4, rows, 8), torch.randn(2, 2, n_tokens, 8)
    far = torch.randn(2, 2, n_far, 8) if n_far else None
    padded, keys = joint.pad_rows(q), joint.join_keys(far, k)
    assert padded.shape == (2, 4, joint.padded_rows, 8) and keys.shape == (2, 2, joint.padded_keys, 8)
    assert torch.equal(padded[:, :, :rows], q) and not padded[:, :, rows:].any()
    assert torch.equal(keys[:, :, joint.first_token : joint.first_token + n_tokens], k)
    assert far is None or torch.equal(keys[:, :, :n_far], far)
    assert keys.count_nonzero() == k.count_nonzero() + (0 if far is None else far.count_nonzero())


def test_whole_tiles_are_not_copied() -> None:
    joint = Geometry(256, 0, 256, 128)
    q = torch.randn(1, 2, 256, 8)
    assert joint.pad_rows(q) is q and joint.join_keys(None, q) is q


def test_an_interval_may_not_cross_into_the_tokens() -> None:
    row = np.zeros(1, dtype=np.int64)
    with pytest.raises(AssertionError, match="crosses into the tokens"):
        Geometry(4, 8, 4, 32).place(lowering.Rows(row, row + 6, row + 9))


def test_adjacent_intervals_become_one() -> None:
    row = np.array([0, 0, 0, 1], dtype=np.int64)
    placed = Geometry(2, 4, 8, 32).place(lowering.Rows(row, np.array([0, 4, 6, 9]), np.array([2, 6, 8, 12])))
    assert placed.row.tolist() == [0, 0, 1] and placed.lo.tolist() == [0, 32, 37] and placed.hi.tolist() == [2, 36, 40]


def test_many_intervals_become_bits_of_few_shapes() -> None:
    spec = MaskSpec(LocalPattern("dilated", window=64, dilation=3, unit=1))
    kinds = {flex_mask(random_plan(seed, 2, 500, spec), CPU, 128).shape_class for seed in range(4)}
    assert kinds == {("bits", 64, 2)}
    rounded = {flex_mask(random_plan(seed, 1, 300, spec_of(40, 16, 1)), CPU, 128).shape_class[1] for seed in range(8)}
    assert rounded <= {*lowering.INTERVALS, 64}


def test_one_mask_for_all_layers_and_for_plans_of_equal_samples() -> None:
    clear_plans()
    plan, other = plain_plan(), plain_plan()
    assert plan is not other and plan.samples[0] is other.samples[0]
    mask = flex_mask(plan, CPU, 128)
    assert flex_mask(plan, CPU, 128) is mask and flex_mask(other, CPU, 128) is mask
    assert flex_mask(plan, CPU, 64) is not mask


def test_a_mask_lives_as_long_as_its_plans() -> None:
    plan, other = plain_plan(length=200), plain_plan(length=200)
    mask = weakref.ref(flex_mask(plan, CPU, 128))
    flex_mask(other, CPU, 128)
    clear_plans()
    del plan
    gc.collect()
    assert mask() is not None
    del other
    gc.collect()
    assert mask() is None


def test_a_mask_made_in_inference_mode_serves_training() -> None:
    clear_plans()
    plan = plain_plan(length=260)
    with torch.inference_mode():
        mask = flex_mask(plan, CPU, 128)
    assert flex_mask(plan, CPU, 128) is mask
    assert not mask.block_mask.kv_indices.is_inference() and not mask.block_mask.q_indices.is_inference()


def test_rows_without_any_key() -> None:
    records = torch.full((1, 40, 4), -1, dtype=torch.int32)
    records[:, :, 1:] = 0
    plan = plan_for(records, PLAIN, spec_of(None))
    mask = flex_mask(plan, CPU, 128)
    assert mask.visited_pairs == 0 and not visited(mask).any()
