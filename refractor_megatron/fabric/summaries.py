"""Tier B: summaries of key/value blocks by attention pooling, mean or maximum (spec section 4; definitions 6.3).

Keys arrive after RoPE. A summary is made of *content* keys, before RoPE, and then stands at the centre of its tokens:
what it holds does not depend on where in the sequence its block lies. A weighted sum needs no un-rotated keys. Turning
each key from its own position to the centre takes the offset inside the block only, and the pooling scores
p . k_content stay the same when the query ``p`` is turned to the centre instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from refractor_megatron.fabric.positions import rotate_to

Pooling = Literal["attn_pool", "mean", "max"]


@dataclass(frozen=True)
class _Groups:
    """``count`` groups of consecutive items, each pooled into one place.

    items: keys of a group; together: neighbouring keys that share a position; spacing: tokens from one position to the
    next; first: the position of the group's first token.
    """

    count: int
    items: int
    together: int = 1
    spacing: float = 1.0
    first: int = 0

    @property
    def span(self) -> float:
        """Tokens of a group."""
        return self.items / self.together * self.spacing

    def offsets(self, device: torch.device) -> torch.Tensor:
        """float64 [items]: positions relative to the group's centre."""
        step = torch.arange(self.items, device=device) // self.together
        return (step.double() + 0.5) * self.spacing - self.span / 2

    def centres(self, device: torch.device) -> torch.Tensor:
        """float64 [count]: positions of the centres."""
        start = torch.arange(self.count, dtype=torch.float64, device=device) * self.span
        return start + (self.first + (self.span - 1) / 2)


def pool(
    kind: Pooling,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor | None,
    per_block: int,
    block_size: int,
    inv_freq: torch.Tensor | None,
    first_position: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools every complete block of ``block_size`` tokens into S = ``per_block`` summaries.

    k, v: [b, h_kv, L, d], keys after RoPE at positions ``first_position + i``; inv_freq: [r/2] angles per position of
    the rotary part (the first r of d), None without RoPE. Returns k_s, v_s: [b, h_kv, (L // block_size) * S, d],
    summary s of block n at ``n * S + s``, in the dtype of k and v. A trailing incomplete block yields no summary.

    attn_pool: S softmaxes over the block with the learned ``queries`` [h_kv, S, d]; all S stand at the block's centre.
    mean, max (elementwise): the block's S equal parts, each pooled and standing at its own centre; no queries,
    S must divide the block. Half-precision inputs are pooled in float32.
    """
    heads, d, blocks = k.shape[1], k.shape[3], k.shape[2] // block_size
    assert v.shape == k.shape, (tuple(k.shape), tuple(v.shape))
    k, v = k[:, :, : blocks * block_size], v[:, :, : blocks * block_size]
    if kind == "attn_pool":
        groups = _Groups(blocks, block_size, first=first_position)
        return _attend(k, v, _checked(queries, heads, per_block, d), groups, inv_freq)
    assert queries is None and block_size % per_block == 0, (kind, block_size, per_block)
    parts = _Groups(blocks * per_block, block_size // per_block, first=first_position)
    return _reduce(kind, k, v, parts, inv_freq)


def pool_level2(
    kind: Pooling,
    k_s: torch.Tensor,
    v_s: torch.Tensor,
    queries: torch.Tensor | None,
    per_block: int,
    fanout: int,
    block_size: int,
    inv_freq: torch.Tensor | None,
    first_position: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools the summaries of every ``fanout`` consecutive blocks, as ``pool`` made them, into S of the second level.

    k_s, v_s: [b, h_kv, n * S, d]; ``first_position``: of the first block's first token; queries: level 2's own
    [h_kv, S, d]. Returns [b, h_kv, (n // fanout) * S, d]: for attn_pool all S of a group stand at its centre; for mean
    and max each of the group's S equal parts stands at its own, and equals ``pool`` over blocks ``fanout`` times as
    long. A trailing incomplete group yields nothing.
    """
    _, heads, summaries, d = k_s.shape
    assert v_s.shape == k_s.shape and summaries % per_block == 0, (tuple(k_s.shape), tuple(v_s.shape), per_block)
    count = summaries // (fanout * per_block)
    k_s, v_s = (x[:, :, : count * fanout * per_block] for x in (k_s, v_s))
    if kind == "attn_pool":
        groups = _Groups(count, fanout * per_block, per_block, block_size, first_position)
        return _attend(k_s, v_s, _checked(queries, heads, per_block, d), groups, inv_freq)
    assert queries is None and block_size % per_block == 0, (kind, block_size, per_block)
    parts = _Groups(count * per_block, fanout, spacing=block_size // per_block, first=first_position)
    return _reduce(kind, k_s, v_s, parts, inv_freq)


def _checked(queries: torch.Tensor | None, heads: int, per_block: int, d: int) -> torch.Tensor:
    assert queries is not None and queries.shape == (heads, per_block, d), (heads, per_block, d)
    return queries


def _attend(
    k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor, groups: _Groups, inv_freq: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax pooling of [b, h, count * items, d] with queries [h, S, d] -> twice [b, h, count * S, d]."""
    dtype = torch.promote_types(torch.promote_types(k.dtype, queries.dtype), torch.float32)
    keys, values = _at_centres(k.to(dtype), groups, inv_freq), _grouped(v.to(dtype), groups)
    heads, per_group, d = queries.shape
    turned = queries.to(dtype).unsqueeze(2).expand(heads, per_group, groups.count, d)
    if inv_freq is not None:
        turned = rotate_to(turned, groups.centres(k.device), inv_freq)
    scores = (turned.transpose(1, 2) * d**-0.5) @ keys.transpose(-1, -2)  # [b, h, count, S, items]
    weights = torch.softmax(scores, dim=-1)
    return (weights @ keys).flatten(2, 3).to(k.dtype), (weights @ values).flatten(2, 3).to(v.dtype)


def _reduce(
    kind: Pooling, k: torch.Tensor, v: torch.Tensor, groups: _Groups, inv_freq: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean or maximum of [b, h, count * items, d] over each group -> twice [b, h, count, d]."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    keys, values = _at_centres(k.to(dtype), groups, inv_freq), _grouped(v.to(dtype), groups)
    if kind == "mean":
        return keys.mean(3).to(k.dtype), values.mean(3).to(v.dtype)
    if inv_freq is None:
        return keys.amax(3).to(k.dtype), values.amax(3).to(v.dtype)
    # Unlike a sum, a maximum does not commute with a rotation: it is taken in the content frame.
    centres = groups.centres(k.device)
    content = rotate_to(keys.transpose(2, 3), -centres, inv_freq).amax(2)
    return rotate_to(content, centres, inv_freq).to(k.dtype), values.amax(3).to(v.dtype)


def _grouped(x: torch.Tensor, groups: _Groups) -> torch.Tensor:
    """[b, h, count * items, d] -> [b, h, count, items, d]."""
    b, heads, _, d = x.shape
    return x.reshape(b, heads, groups.count, groups.items, d)


def _at_centres(k: torch.Tensor, groups: _Groups, inv_freq: torch.Tensor | None) -> torch.Tensor:
    """Keys by group, each turned from its own position to the centre of its group."""
    grouped = _grouped(k, groups)
    if inv_freq is None:
        return grouped
    return rotate_to(grouped, -groups.offsets(k.device), inv_freq)
