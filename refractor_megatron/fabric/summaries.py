"""Tier B: attention-pooled summaries of key/value blocks (spec section 4; order of work in definitions 6.3).

Keys arrive after RoPE. A summary stands at the centre of its block, so each key is first turned from its own position
to the centre: the rotation depends only on the offset inside the block. The pooling queries ``p`` are learned in the
frame of unrotated (content) keys. Turning ``p`` to the block centre instead of un-rotating every key gives the same
scores, p · k_content, so the pooling weights of a block do not depend on where the block stands.
"""

from __future__ import annotations

import torch


def attn_pool(
    k: torch.Tensor,
    v: torch.Tensor,
    p: torch.Tensor,
    block_size: int,
    inv_freq: torch.Tensor | None,
    position_scale: float = 1.0,
    first_position: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools every complete block of ``block_size`` tokens into S = p.shape[1] summaries.

    k, v: [b, h_kv, L, d], keys after RoPE at positions ``(first_position + i) * position_scale``; p: [h_kv, S, d];
    inv_freq: [r/2] angles per position of the rotary part (first r of d), None without RoPE.
    Returns k_s, v_s: [b, h_kv, (L // block_size) * S, d], summary s of block n at ``n * S + s``, dtype of k and v.
    A trailing incomplete block yields no summary. Half-precision inputs are pooled in float32.
    """
    b, heads, length, d = k.shape
    assert v.shape == k.shape, (tuple(k.shape), tuple(v.shape))
    assert p.dim() == 3 and p.shape[0] == heads and p.shape[2] == d, (tuple(p.shape), tuple(k.shape))
    blocks, per_block = length // block_size, p.shape[1]
    dtype = torch.promote_types(torch.promote_types(k.dtype, p.dtype), torch.float32)
    kept = k[:, :, : blocks * block_size].to(dtype)
    queries = p.to(dtype).unsqueeze(1).expand(heads, blocks, per_block, d)
    if inv_freq is not None:
        kept = rotate_to_centre(kept, inv_freq, block_size, position_scale)
        queries = _rotate(queries, *_centre_angles(inv_freq, blocks, block_size, position_scale, first_position, dtype))
    keys = kept.reshape(b, heads, blocks, block_size, d)
    values = v[:, :, : blocks * block_size].to(dtype).reshape(b, heads, blocks, block_size, d)
    weights = torch.softmax((queries * d**-0.5) @ keys.transpose(-1, -2), dim=-1)
    shape = (b, heads, blocks * per_block, d)
    return (weights @ keys).reshape(shape).to(k.dtype), (weights @ values).reshape(shape).to(v.dtype)


def rotate_to_centre(
    k: torch.Tensor, inv_freq: torch.Tensor, block_size: int, position_scale: float = 1.0
) -> torch.Tensor:
    """Turns each rotated key of [..., n * block_size, d] from its own position to the centre of its block.

    RoPE is the rotate-half (non-interleaved) form of Megatron and HF; only the first ``2 * len(inv_freq)`` of d turn.
    """
    length = k.shape[-2]
    assert length % block_size == 0, (length, block_size)
    offset = torch.arange(block_size, device=k.device, dtype=torch.float64)
    turn = ((block_size - 1) / 2 - offset) * position_scale
    angles = torch.outer(turn, inv_freq.to(device=k.device, dtype=torch.float64))
    blocked = k.reshape(*k.shape[:-2], length // block_size, block_size, k.shape[-1])
    return _rotate(blocked, angles.cos().to(k.dtype), angles.sin().to(k.dtype)).reshape(k.shape)


def _centre_angles(
    inv_freq: torch.Tensor, blocks: int, block_size: int, scale: float, first_position: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [blocks, 1, r/2] of the block centres. Angles in float64: float32 loses 0.004 rad at 64k."""
    start = torch.arange(blocks, device=inv_freq.device, dtype=torch.float64) * block_size
    centre = (start + ((block_size - 1) / 2 + first_position)) * scale
    angles = torch.outer(centre, inv_freq.double())[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates pairs (i, i + r/2) of the first r of the last dimension by angles [..., r/2]."""
    half = cos.shape[-1]
    assert 2 * half <= x.shape[-1], (half, tuple(x.shape))
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*turned, x[..., 2 * half :]] if 2 * half < x.shape[-1] else turned, dim=-1)
