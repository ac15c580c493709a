"""Summaries of both levels: the pooling formulas, where a summary stands, and that blocks do not mix."""

from __future__ import annotations

import pytest
import torch

from refractor_megatron.fabric.summaries import Pooling, pool, pool_level2

B, HEADS, D, BLOCK, PER_BLOCK, FANOUT = 2, 3, 12, 8, 2, 3
KINDS: list[Pooling] = ["attn_pool", "mean", "max"]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rope(x: torch.Tensor, inv_freq: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate-half RoPE as Megatron and HF apply it: x * cos + rotate_half(x) * sin on the first 2 * len(inv_freq)."""
    angles = torch.outer(positions, inv_freq)
    angles = torch.cat([angles, angles], dim=-1)
    rotary, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    first, second = rotary.chunk(2, dim=-1)
    return torch.cat([rotary * angles.cos() + torch.cat([-second, first], -1) * angles.sin(), rest], dim=-1)


def frequencies(pairs: int) -> torch.Tensor:
    return 100.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


def positions(length: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.float64)


def queries(kind: Pooling, seed: int, per_block: int = PER_BLOCK) -> torch.Tensor | None:
    return normal(seed, HEADS, per_block, D) if kind == "attn_pool" else None


def pooled_one(
    kind: Pooling, items: torch.Tensor, values: torch.Tensor, p: torch.Tensor | None, s: int, per: int
) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """Summary s of one group of content keys [n, d]: (key, value, which items it stands for)."""
    if kind == "attn_pool":
        assert p is not None
        weights = torch.softmax(items @ p[s] / D**0.5, dim=0)
        return weights @ items, weights @ values, slice(0, len(items))
    part = slice(s * len(items) // per, (s + 1) * len(items) // per)
    if kind == "mean":
        return items[part].mean(0), values[part].mean(0), part
    return items[part].max(0).values, values[part].max(0).values, part


def naive(
    kind: Pooling, content: torch.Tensor, v: torch.Tensor, place: torch.Tensor, p: torch.Tensor | None, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loops over groups of ``size`` content keys: (content of the summaries, their values, their positions)."""
    b, heads, length, _ = content.shape
    groups = length // size
    shape = (b, heads, groups * PER_BLOCK, D)
    keys, values, centres = torch.zeros(shape).double(), torch.zeros(shape).double(), torch.zeros(shape[2]).double()
    for i in range(b):
        for h in range(heads):
            for n in range(groups):
                block = slice(n * size, (n + 1) * size)
                for s in range(PER_BLOCK):
                    query = None if p is None else p[h]
                    items, item_values = content[i, h, block], v[i, h, block]
                    key, value, part = pooled_one(kind, items, item_values, query, s, PER_BLOCK)
                    keys[i, h, n * PER_BLOCK + s], values[i, h, n * PER_BLOCK + s] = key, value
                    centres[n * PER_BLOCK + s] = place[block][part].mean()
    return keys, values, centres


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pairs", "first"), [(0, 0), (D // 2, 0), (2, 1000)])
def test_both_levels_against_loops_over_content_keys(kind: Pooling, pairs: int, first: int) -> None:
    """The definition: pool unrotated keys, then rotate each summary to the centre of what it stands for."""
    length = 2 * FANOUT * BLOCK + BLOCK + 3
    inv_freq = frequencies(pairs) if pairs else None

    def turned(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return x if inv_freq is None else rope(x, inv_freq, at)

    content, v, at = normal(0, B, HEADS, length, D), normal(1, B, HEADS, length, D), positions(length) + first
    p1, p2 = queries(kind, 2), queries(kind, 3)
    k_s, v_s = pool(kind, turned(content, at), v, p1, PER_BLOCK, BLOCK, inv_freq, first)
    content_1, values_1, at_1 = naive(kind, content, v, at, p1, BLOCK)
    assert k_s.shape == (B, HEADS, 7 * PER_BLOCK, D)
    assert torch.allclose(k_s, turned(content_1, at_1), atol=1e-12) and torch.allclose(v_s, values_1, atol=1e-12)

    k_2, v_2 = pool_level2(kind, k_s, v_s, p2, PER_BLOCK, FANOUT, BLOCK, inv_freq, first)
    content_2, values_2, at_2 = naive(kind, content_1, values_1, at_1, p2, FANOUT * PER_BLOCK)
    assert k_2.shape == (B, HEADS, 2 * PER_BLOCK, D), "the seventh block starts a group that is not complete"
    assert torch.allclose(k_2, turned(content_2, at_2), atol=1e-12) and torch.allclose(v_2, values_2, atol=1e-12)


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_level_2_of_means_and_maxima_is_one_level_of_long_blocks(kind: Pooling) -> None:
    k, v = normal(0, B, HEADS, 6 * BLOCK, D), normal(1, B, HEADS, 6 * BLOCK, D)
    level_1 = pool(kind, k, v, None, PER_BLOCK, BLOCK, frequencies(4))
    two = pool_level2(kind, *level_1, None, PER_BLOCK, FANOUT, BLOCK, frequencies(4))
    one = pool(kind, k, v, None, PER_BLOCK, FANOUT * BLOCK, frequencies(4))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(two, one, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_shifting_every_position_leaves_scores_unchanged(kind: Pooling) -> None:
    """Relative geometry, both levels: the scores of any query with any summary depend on distances alone."""
    inv_freq, length = frequencies(4), 6 * BLOCK
    content, v, q = (normal(i, B, HEADS, length, D) for i in range(3))
    p1, p2 = queries(kind, 3), queries(kind, 4)
    seen = []
    for shift in (0, 1001):
        at = positions(length) + shift
        k_1, v_1 = pool(kind, rope(content, inv_freq, at), v, p1, PER_BLOCK, BLOCK, inv_freq, shift)
        k_2, v_2 = pool_level2(kind, k_1, v_1, p2, PER_BLOCK, FANOUT, BLOCK, inv_freq, shift)
        scores = rope(q, inv_freq, at) @ torch.cat([k_2, k_1], dim=2).transpose(-1, -2)
        seen.append([scores, v_1, v_2])
    for near, far in zip(*seen, strict=True):
        assert torch.allclose(near, far, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_blocks_give_equal_summaries_wherever_they_stand(kind: Pooling) -> None:
    inv_freq = frequencies(6)
    content, v = (normal(i, 1, HEADS, BLOCK, D).repeat(1, 1, 50, 1) for i in range(2))
    k = rope(content, inv_freq, positions(50 * BLOCK))
    k_s, v_s = pool(kind, k, v, queries(kind, 2, per_block=1), 1, BLOCK, inv_freq)
    unrotated = rope(k_s, inv_freq, -(positions(50) * BLOCK + (BLOCK - 1) / 2))
    assert torch.allclose(unrotated, unrotated[:, :, :1].expand_as(unrotated), atol=1e-12)
    assert torch.allclose(v_s, v_s[:, :, :1].expand_as(v_s), atol=1e-12)


def test_a_maximum_of_rotated_keys_would_depend_on_the_position() -> None:
    """Why max needs the content frame: the shortcut that serves mean and attn_pool is wrong for it."""
    inv_freq, content = frequencies(6), normal(0, 1, 1, BLOCK, D)
    shortcut = []
    for shift in (0, 17):
        k = rope(content, inv_freq, positions(BLOCK) + shift)
        centre = torch.full((BLOCK,), (BLOCK - 1) / 2 + shift, dtype=torch.float64)
        at_centre = rope(k, inv_freq, centre - positions(BLOCK) - shift).amax(2, keepdim=True)
        shortcut.append(rope(at_centre, inv_freq, -centre[:1]))
    assert not torch.allclose(*shortcut, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_do_not_mix_and_a_ragged_tail_is_ignored(kind: Pooling) -> None:
    length = 3 * BLOCK + 5
    k, v, p = normal(0, B, HEADS, length, D), normal(1, B, HEADS, length, D), queries(kind, 2)
    before = pool(kind, k, v, p, PER_BLOCK, BLOCK, frequencies(3))
    k, v = k.clone(), v.clone()
    k[:, :, BLOCK : BLOCK + 3] += 1
    v[:, :, 3 * BLOCK :] += 1
    after = pool(kind, k, v, p, PER_BLOCK, BLOCK, frequencies(3))
    assert torch.equal(before[0][:, :, :PER_BLOCK], after[0][:, :, :PER_BLOCK])
    assert torch.equal(before[0][:, :, 2 * PER_BLOCK :], after[0][:, :, 2 * PER_BLOCK :])
    assert torch.equal(before[1][:, :, 2 * PER_BLOCK :], after[1][:, :, 2 * PER_BLOCK :])
    assert not torch.equal(before[0][:, :, PER_BLOCK : 2 * PER_BLOCK], after[0][:, :, PER_BLOCK : 2 * PER_BLOCK])


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_a_context_parallel_rank_give_their_share(kind: Pooling) -> None:
    k, v, p = normal(0, B, HEADS, 6 * BLOCK, D), normal(1, B, HEADS, 6 * BLOCK, D), queries(kind, 2)
    whole = pool(kind, k, v, p, PER_BLOCK, BLOCK, frequencies(4))
    start = 4 * BLOCK
    share = pool(kind, k[:, :, start:], v[:, :, start:], p, PER_BLOCK, BLOCK, frequencies(4), start)
    for a, b in zip(whole, share, strict=True):
        assert torch.allclose(a[:, :, 4 * PER_BLOCK :], b, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_shorter_than_a_block_or_a_group_gives_no_summary(kind: Pooling) -> None:
    k, v, p = normal(0, 1, HEADS, 7, D), normal(1, 1, HEADS, 7, D), queries(kind, 2)
    k_s, v_s = pool(kind, k, v, p, PER_BLOCK, BLOCK, frequencies(2))
    assert k_s.shape == v_s.shape == (1, HEADS, 0, D)
    k_s, v_s = pool_level2(kind, k[:, :, :4], v[:, :, :4], p, PER_BLOCK, FANOUT, BLOCK, frequencies(2))
    assert k_s.shape == v_s.shape == (1, HEADS, 0, D)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_pools_in_float32(kind: Pooling) -> None:
    k, v, p = normal(0, B, HEADS, 64, D).bfloat16(), normal(1, B, HEADS, 64, D).bfloat16(), queries(kind, 2)
    p = None if p is None else p.bfloat16()
    k_s, v_s = pool(kind, k, v, p, PER_BLOCK, 32, frequencies(3))
    reference = pool(kind, k.double(), v.double(), None if p is None else p.double(), PER_BLOCK, 32, frequencies(3))
    assert k_s.dtype == v_s.dtype == torch.bfloat16
    for a, b in zip((k_s, v_s), reference, strict=True):
        assert torch.allclose(a.double(), b, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_angles_stay_exact_far_out(kind: Pooling) -> None:
    """At 128k float32 positions times frequencies are off by about 0.008 rad; ours are computed in float64."""
    inv_freq, shift = 0.7 * torch.ones(D // 2, dtype=torch.float64), 131_072 - 64
    content, p = normal(0, 1, HEADS, 64, D), queries(kind, 1)
    p = None if p is None else p.float()
    far = rope(content, inv_freq, positions(64) + shift).float()
    near = rope(content, inv_freq, positions(64)).float()
    k_far, v_far = pool(kind, far, content.float(), p, PER_BLOCK, 32, inv_freq, shift)
    k_near, v_near = pool(kind, near, content.float(), p, PER_BLOCK, 32, inv_freq)
    turned = rope(k_near.double(), inv_freq, torch.full((4,), float(shift), dtype=torch.float64))
    assert torch.allclose(v_far, v_near, atol=2e-6)
    assert torch.allclose(k_far.double(), turned, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_both_levels(kind: Pooling) -> None:
    leaves = [normal(i, 1, 2, 17, 4).requires_grad_() for i in range(2)]
    if kind == "attn_pool":
        leaves += [normal(i, 2, 2, 4).requires_grad_() for i in (2, 3)]

    def both(k: torch.Tensor, v: torch.Tensor, *p: torch.Tensor) -> tuple[torch.Tensor, ...]:
        p1, p2 = p or (None, None)
        level_1 = pool(kind, k, v, p1, 2, 4, frequencies(2))
        return (*level_1, *pool_level2(kind, *level_1, p2, 2, 2, 4, frequencies(2)))

    assert torch.autograd.gradcheck(both, leaves)


def test_parts_that_do_not_divide_the_block_are_our_mistake() -> None:
    x = normal(0, 1, 1, 24, D)
    with pytest.raises(AssertionError):
        pool("mean", x, x, None, 3, 8, None)
    with pytest.raises(AssertionError):
        pool("max", x, x, normal(1, 1, 2, D), 2, 8, None)
