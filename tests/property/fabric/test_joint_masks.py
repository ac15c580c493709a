"""Every geometry, every tier, every part of a sequence: intervals against the elementwise definition, edge for edge."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.distinction.generators import random_records, random_rules
from refractor_megatron.distinction.intervals import compile_intervals
from refractor_megatron.distinction.lowerings import dense_mask, mask_mod
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.retrieved import policy_codes
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.fabric.joint import JointSpace, dense_joint, sample_keys
from refractor_megatron.fabric.spec import ALL_TIERS, WHOLE, ContextPart, MaskSpec, RetrievedSpec, SummarySpec

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def patterns(draw: st.DrawFn, most: int = 40) -> LocalPattern:
    kind = draw(st.sampled_from(("sliding", "dilated", "block", "hybrid")))
    window = draw(st.integers(1, most))
    if kind == "sliding":
        if draw(st.integers(0, 5)) == 0:
            return LocalPattern()
        return LocalPattern("sliding", window, stride=draw(st.integers(1, window)))
    if kind == "block":
        return LocalPattern("block", window)
    return LocalPattern(kind, window, draw(st.integers(1, 4)), draw(st.integers(1, 12)))


def with_ids(rng: np.random.Generator, records: np.ndarray, chunk: int, fan_in: int, known: int) -> np.ndarray:
    """Appends id columns: each chunk its own random records, valid ones first."""
    ids = np.full((len(records), fan_in), -1, dtype=np.int32)
    for start in range(0, len(records), chunk):
        valid = int(rng.integers(0, fan_in + 1))
        ids[start : start + chunk, :valid] = rng.integers(0, known, valid)
    return np.concatenate([records, ids], axis=1)


@settings(max_examples=150, deadline=None)
@given(SEEDS, patterns(), st.integers(1, 90))
def test_patterns_agree_in_all_three_forms(seed: int, pattern: LocalPattern, length: int) -> None:
    rng = np.random.default_rng(seed)
    records, rules = random_records(rng, length), compile_rules(random_rules(rng))
    dense = dense_mask(torch.from_numpy(records), rules, pattern)
    rows = compile_intervals(records, rules, pattern).rows
    assert (rows.dense(length, 0, length) == dense.numpy()).all()
    index = torch.arange(length)
    assert (mask_mod(torch.from_numpy(records), rules, pattern)(index[:, None], index) == dense).all()
    distance = index[:, None] - index
    assert not (dense & (distance > pattern.reach(length))).any()


@settings(max_examples=150, deadline=None)
@given(SEEDS, patterns(), st.integers(1, 5), st.integers(1, 3), st.sampled_from((1, 2, 4)), st.data())
def test_joint_intervals_equal_the_oracle(
    seed: int, pattern: LocalPattern, block: int, per_block: int, ranks: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    # A context-parallel chunk holds whole blocks, whole retrieval chunks and the reach of the pattern.
    unit = block * 2
    size = -(-max(pattern.reach(1 << 20) if pattern.window else 30, unit) // unit) * unit
    length = size * 2 * ranks if ranks > 1 else data.draw(st.integers(1, 90))
    rules = compile_rules(random_rules(rng, causal=ranks > 1))
    summary = SummarySpec(block, per_block, data.draw(st.integers(1, 2)), data.draw(st.integers(2, 3)))
    retrieved = RetrievedSpec(unit, data.draw(st.integers(1, 4)))
    tiers = data.draw(st.sampled_from((ALL_TIERS, *(frozenset({t}) for t in sorted(ALL_TIERS)))))
    spec = MaskSpec(
        pattern if ranks == 1 or pattern.window else LocalPattern(window=size),
        summary if data.draw(st.booleans()) else None,
        retrieved if data.draw(st.booleans()) else None,
        tiers,
    )
    policies = rng.integers(0, 4, 6).astype(np.uint8)
    records = with_ids(rng, random_records(rng, length), unit, retrieved.fan_in, len(policies))
    if spec.retrieved is None:
        records = records[:, :4]
    records = np.ascontiguousarray(records)
    for rank in range(ranks):
        part = ContextPart(rank, ranks)
        space = JointSpace.of(spec, part, length)
        dense = dense_joint(torch.from_numpy(records), rules, spec, part, policies).numpy()
        assert dense.shape == (space.rows, space.far + space.tokens)
        codes = policy_codes(records, unit, retrieved.fan_in, policies) if spec.retrieved is not None else None
        keys = sample_keys(records, rules, spec, part, codes)
        assert (keys.rows.dense(space.rows, 0, dense.shape[1]) == dense).all()
        assert keys.edges == dense.sum()
        assert keys.dead.tolist() == np.flatnonzero(~dense.any(1)).tolist()
        for tier, (lo, hi) in space.tiers().items():
            assert tier in tiers or not dense[:, lo:hi].any()


@settings(max_examples=60, deadline=None)
@given(SEEDS, patterns(20), st.sampled_from((2, 4)))
def test_parts_hold_every_edge_once(seed: int, pattern: LocalPattern, ranks: int) -> None:
    """The legal edges of all context-parallel ranks together are those of one rank."""
    rng = np.random.default_rng(seed)
    block = 4
    size = ((pattern.reach(1 << 20) if pattern.window else 20) // block + 1) * block
    length = size * 2 * ranks
    spec = MaskSpec(pattern if pattern.window else LocalPattern(window=size), SummarySpec(block, 2, 2, 2))
    rules, records = compile_rules(random_rules(rng, causal=True)), random_records(rng, length)
    whole = sample_keys(records, rules, spec, WHOLE, None)
    parts = [sample_keys(records, rules, spec, ContextPart(rank, ranks), None) for rank in range(ranks)]
    assert sum(part.edges for part in parts) == whole.edges
    assert sum(len(part.dead) for part in parts) == len(whole.dead)


def test_second_level_stands_in_for_its_blocks() -> None:
    """Each earlier token of a plain document is read once: directly, by its block, or by its group."""
    length, block, fanout = 256, 4, 4
    spec = MaskSpec(LocalPattern(window=8), SummarySpec(block, 1, 2, fanout))
    records = torch.zeros(length, 4, dtype=torch.int32)
    mask = dense_joint(records, compile_rules([]), spec, WHOLE, None)
    groups, blocks = length // (block * fanout), length // block
    tokens = torch.cat(
        [
            mask[:, :groups].repeat_interleave(block * fanout, 1).int().unsqueeze(0),
            mask[:, groups : groups + blocks].repeat_interleave(block, 1).int().unsqueeze(0),
            mask[:, groups + blocks :].int().unsqueeze(0),
        ]
    ).sum(0)
    # The block that straddles the window's edge is read twice, as with one level; nothing else is.
    position = torch.arange(length)
    start = (position - 8 + 1).clamp(min=0)
    straddles = (position // block == (start // block)[:, None]) & (start % block != 0)[:, None]
    earlier = position <= position[:, None]
    assert (tokens[earlier & ~straddles] == 1).all()
    assert (tokens[~earlier] == 0).all() and int(tokens.max()) <= 2


def test_far_summaries_grow_with_the_root_of_nothing() -> None:
    """Two levels: the far keys of the last query of 128k tokens are a tenth of those of one level."""
    length = 131072
    records = np.zeros((length, 4), dtype=np.int32)
    counts = []
    for levels in (1, 2):
        spec = MaskSpec(LocalPattern(window=512), SummarySpec(128, 2, levels, 16))
        keys = sample_keys(records, compile_rules([]), spec, WHOLE, None)
        counts.append(keys.rows.between(length - 1, length).count() - 512)
    assert counts[0] == (length - 512) // 128 * 2 and counts[1] < counts[0] / 8
