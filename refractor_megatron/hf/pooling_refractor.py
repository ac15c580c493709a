"""Positions and pooling: rotary angles, summaries of groups of keys, random features. Travels beside the weights.

Shapes: b samples, g key/value heads, d head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .configuration_refractor import RefractorConfig


class Rotary:
    """Angles per position (float64) and the factor on cosines and sines, of rope types default, linear and yarn."""

    def __init__(self, config: RefractorConfig) -> None:
        rope, dim = config.rope_parameters, config.rotary_dim
        theta, factor = float(rope["rope_theta"]), float(rope.get("factor", 1.0))
        plain = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
        self.inv_freq, self.factor = plain / factor, 1.0
        if rope["rope_type"] == "default":
            self.inv_freq = plain
        elif rope["rope_type"] == "yarn":  # Peng et al. 2023
            length = float(rope["original_max_position_embeddings"])
            turns = [float(rope.get(name) or usual) for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0))]
            at = [dim * math.log(length / (t * 2 * math.pi)) / (2 * math.log(theta)) for t in turns]
            low, high = max(math.floor(at[0]), 0), min(math.ceil(at[1]), dim - 1)
            ramp = (torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / max(high - low, 0.001)
            ramp = ramp.clamp(0, 1)
            self.inv_freq = plain * (1 - ramp) + plain / factor * ramp
            self.factor = float(rope.get("attention_factor") or 0.1 * math.log(factor) + 1.0)

    def angles(self, position: Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., r / 2] of positions [...], from angles in float64."""
        self.inv_freq = self.inv_freq.to(position.device)
        angle = position[..., None].double() * self.inv_freq
        return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)

    def turn(self, x: Tensor, position: Tensor, factor: float = 1.0) -> Tensor:
        """Rotates x [..., d] to positions [...] (broadcastable)."""
        return rotated(x, *self.angles(position, x.dtype, factor))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first r of x [..., d], in pairs (i, i + r / 2)."""
    r = cos.shape[-1]
    first, second, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    turned = first * cos - second * sin
    return torch.cat([turned, second * cos + first * sin, rest.expand(*turned.shape[:-1], -1)], dim=-1)


def pool(
    kind: str, k: Tensor, v: Tensor, offset: Tensor, centre: Tensor, queries: Tensor | None, rotary: Rotary
) -> tuple[Tensor, Tensor]:
    """Summaries of groups: k, v [b, g, groups, items, d] -> twice [b, g, groups * S, d].

    Keys come rotated. Each is turned from its own place, ``offset`` [items] from its group's centre, to that centre
    [b, groups], so a summary's content does not depend on where its group lies. ``queries`` [g, S, d] for attn_pool.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    keys, values = rotary.turn(k.to(wide), -offset), v.to(wide)
    place = centre[:, None, :, None]  # [b, 1, groups, 1]
    if kind == "attn_pool":
        assert queries is not None
        turned = rotary.turn(queries.to(wide)[None, :, None], place)  # [b, g, groups, S, d]
        weight = torch.softmax(turned @ keys.transpose(-1, -2) * k.shape[-1] ** -0.5, dim=-1)
        pooled_k, pooled_v = weight @ keys, weight @ values
    elif kind == "mean":
        pooled_k, pooled_v = keys.mean(3, keepdim=True), values.mean(3, keepdim=True)
    else:  # a maximum does not commute with a rotation: it is taken on unrotated content
        content = rotary.turn(keys, -place).amax(3, keepdim=True)
        pooled_k, pooled_v = rotary.turn(content, place), values.amax(3, keepdim=True)
    return pooled_k.flatten(2, 3).to(k.dtype), pooled_v.flatten(2, 3).to(v.dtype)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [b, i] of x [b, g, m, d] -> [b, g, i, d]."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def favor_directions(seed: int, layer: int, heads: int, features: int, d: int) -> Tensor:
    """float64 [heads, features, d]: orthogonal random directions of FAVOR+ (Choromanski et al. 2020)."""
    import numpy as np  # its legacy generator is frozen: any version draws the same features

    drawn = []
    for head in range(heads):
        rng = np.random.RandomState([seed, layer, head])
        blocks = []
        for first in range(0, features, d):
            q, r = np.linalg.qr(rng.standard_normal((d, d)))
            lengths = np.linalg.norm(rng.standard_normal((d, d)), axis=1)
            blocks.append(((q * np.sign(np.diag(r))).T * lengths[:, None])[: features - first])
        drawn.append(np.concatenate(blocks))
    return torch.from_numpy(np.stack(drawn))
