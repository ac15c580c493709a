"""Rotary positions outside Megatron: keys that the fabric makes itself (summaries, retrieved records) need one."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates pairs (i, i + r/2) of the first r of the last dimension by angles [..., r/2].

    The rotate-half (non-interleaved) form of Megatron and HF.
    """
    half = cos.shape[-1]
    assert 2 * half <= x.shape[-1], (half, tuple(x.shape))
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*turned, x[..., 2 * half :]] if 2 * half < x.shape[-1] else turned, dim=-1)


def rotate_to(x: torch.Tensor, position: torch.Tensor, inv_freq: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Content keys [..., n, d] at positions [n]; inv_freq [r/2], angles per position; factor on cosines and sines.

    Angles in float64: float32 loses 0.004 rad at 64k.
    """
    angles = torch.outer(position.double(), inv_freq.double())
    return rotate(x, (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype))
