"""Summaries: the pooling formula, rotation to the centre, and that blocks do not mix."""

from __future__ import annotations

import pytest
import torch

from refractor_megatron.fabric.summaries import attn_pool, rotate_to_centre

B, HEADS, D, BLOCK, PER_BLOCK = 2, 3, 12, 8, 2


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


def test_without_rope_it_is_a_softmax_over_each_block() -> None:
    k, v, p = (
        normal(0, B, HEADS, 2 * BLOCK + 3, D),
        normal(1, B, HEADS, 2 * BLOCK + 3, D),
        normal(2, HEADS, PER_BLOCK, D),
    )
    k_s, v_s = attn_pool(k, v, p, BLOCK, None)
    assert k_s.shape == (B, HEADS, 2 * PER_BLOCK, D)
    for n in range(2):
        for s in range(PER_BLOCK):
            block = slice(n * BLOCK, (n + 1) * BLOCK)
            weights = torch.softmax((k[1, 2, block] @ p[2, s]) / D**0.5, dim=0)
            assert torch.allclose(k_s[1, 2, n * PER_BLOCK + s], weights @ k[1, 2, block], atol=1e-14)
            assert torch.allclose(v_s[1, 2, n * PER_BLOCK + s], weights @ v[1, 2, block], atol=1e-14)


@pytest.mark.parametrize("pairs", [D // 2, 2])
def test_with_rope_it_pools_the_content_and_places_it_at_the_centre(pairs: int) -> None:
    """The definition itself: pool unrotated keys, then rotate the result to the centre of the block."""
    inv_freq, scale = frequencies(pairs), 0.75
    content, v, p = normal(0, B, HEADS, 4 * BLOCK, D), normal(1, B, HEADS, 4 * BLOCK, D), normal(2, HEADS, PER_BLOCK, D)
    k = rope(content, inv_freq, positions(4 * BLOCK) * scale)
    k_s, v_s = attn_pool(k, v, p, BLOCK, inv_freq, position_scale=scale)
    pooled, plain_v = attn_pool(content, v, p, BLOCK, None)
    centres = (torch.arange(4).repeat_interleave(PER_BLOCK) * BLOCK + (BLOCK - 1) / 2) * scale
    assert torch.allclose(k_s, rope(pooled, inv_freq, centres), atol=1e-12)
    assert torch.allclose(v_s, plain_v, atol=1e-12)


def test_shifting_every_position_leaves_scores_unchanged() -> None:
    inv_freq = frequencies(4)
    content, v, p = normal(0, B, HEADS, 4 * BLOCK, D), normal(1, B, HEADS, 4 * BLOCK, D), normal(2, HEADS, PER_BLOCK, D)
    q = normal(3, B, HEADS, 4 * BLOCK, D)
    scores = []
    for shift in (0, 1001):
        at = positions(4 * BLOCK) + shift
        k_s, v_s = attn_pool(rope(content, inv_freq, at), v, p, BLOCK, inv_freq, first_position=shift)
        scores.append((rope(q, inv_freq, at) @ k_s.transpose(-1, -2), v_s))
    assert torch.allclose(scores[0][0], scores[1][0], atol=1e-11)
    assert torch.allclose(scores[0][1], scores[1][1], atol=1e-11)


def test_equal_blocks_get_equal_weights_wherever_they_stand() -> None:
    inv_freq = frequencies(6)
    content = normal(0, 1, HEADS, BLOCK, D).repeat(1, 1, 50, 1)
    v, p = normal(1, 1, HEADS, BLOCK, D).repeat(1, 1, 50, 1), normal(2, HEADS, PER_BLOCK, D)
    _, v_s = attn_pool(rope(content, inv_freq, positions(50 * BLOCK)), v, p, BLOCK, inv_freq)
    blocks = v_s.reshape(1, HEADS, 50, PER_BLOCK, D)
    assert torch.allclose(blocks, blocks[:, :, :1].expand_as(blocks), atol=1e-12)


def test_rotation_to_the_centre() -> None:
    inv_freq = frequencies(4)
    x = normal(0, 1, 1, 2 * BLOCK, D)
    turned = rotate_to_centre(rope(x, inv_freq, positions(2 * BLOCK)), inv_freq, BLOCK)
    centres = torch.tensor([3.5, 11.5], dtype=torch.float64).repeat_interleave(BLOCK)
    assert torch.allclose(turned, rope(x, inv_freq, centres), atol=1e-13)


def test_blocks_do_not_mix_and_a_ragged_tail_is_ignored() -> None:
    length = 3 * BLOCK + 5
    k, v, p = normal(0, B, HEADS, length, D), normal(1, B, HEADS, length, D), normal(2, HEADS, PER_BLOCK, D)
    before = attn_pool(k, v, p, BLOCK, frequencies(3))
    k, v = k.clone(), v.clone()
    k[:, :, BLOCK : BLOCK + 3] += 1
    v[:, :, 3 * BLOCK :] += 1
    after = attn_pool(k, v, p, BLOCK, frequencies(3))
    assert torch.equal(before[0][:, :, :PER_BLOCK], after[0][:, :, :PER_BLOCK])
    assert torch.equal(before[0][:, :, 2 * PER_BLOCK :], after[0][:, :, 2 * PER_BLOCK :])
    assert torch.equal(before[1][:, :, 2 * PER_BLOCK :], after[1][:, :, 2 * PER_BLOCK :])
    assert not torch.equal(before[0][:, :, PER_BLOCK : 2 * PER_BLOCK], after[0][:, :, PER_BLOCK : 2 * PER_BLOCK])


def test_shorter_than_a_block_gives_no_summary() -> None:
    k_s, v_s = attn_pool(normal(0, 1, 2, 7, 4), normal(1, 1, 2, 7, 4), normal(2, 2, 3, 4), 8, frequencies(2))
    assert k_s.shape == v_s.shape == (1, 2, 0, 4)


def test_bf16_pools_in_float32() -> None:
    k, v, p = normal(0, B, HEADS, 64, D), normal(1, B, HEADS, 64, D), normal(2, HEADS, PER_BLOCK, D)
    low = [x.bfloat16() for x in (k, v, p)]
    k_s, v_s = attn_pool(*low, 32, frequencies(3))  # type: ignore[arg-type]
    reference = attn_pool(*(x.double() for x in low), 32, frequencies(3))  # type: ignore[arg-type]
    assert k_s.dtype == v_s.dtype == torch.bfloat16
    assert torch.allclose(k_s.double(), reference[0], atol=8e-3) and torch.allclose(
        v_s.double(), reference[1], atol=8e-3
    )


def test_angles_stay_exact_far_out() -> None:
    """At 128k float32 positions times frequencies are off by about 0.008 rad; ours are computed in float64."""
    inv_freq = torch.ones(2)
    shift = 131_072 - 64
    content, p = normal(0, 1, 1, 64, 4, dtype=torch.float32), normal(1, 1, 1, 4, dtype=torch.float32)
    far = rope(content.double(), inv_freq.double(), positions(64) + shift).float()
    near = rope(content.double(), inv_freq.double(), positions(64)).float()
    _, v_far = attn_pool(far, content, p, 32, inv_freq, first_position=shift)
    _, v_near = attn_pool(near, content, p, 32, inv_freq)
    assert torch.allclose(v_far, v_near, atol=2e-6)


def test_gradients() -> None:
    inputs = [normal(i, *shape).requires_grad_() for i, shape in enumerate([(1, 2, 9, 6), (1, 2, 9, 6), (2, 2, 6)])]
    assert torch.autograd.gradcheck(lambda k, v, p: attn_pool(k, v, p, 4, frequencies(2)), inputs)
