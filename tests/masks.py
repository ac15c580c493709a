"""Short ways to write mask geometries in tests."""

from __future__ import annotations

import torch

from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.fabric.spec import MaskSpec, SummarySpec
from refractor_megatron.fabric.summaries import pool


def sliding(window: int | None) -> LocalPattern:
    """The last ``window`` keys, None for all."""
    return LocalPattern(window=window)


def spec_of(window: int | None, block_size: int | None = None, per_block: int = 0) -> MaskSpec:
    """A sliding window and one level of summaries, without them when either number is missing."""
    summary = SummarySpec(block_size, per_block) if block_size is not None and per_block else None
    return MaskSpec(sliding(window), summary)


def attn_pool(
    k: torch.Tensor, v: torch.Tensor, p: torch.Tensor, block_size: int, inv_freq: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summaries by attention with queries p [h_kv, S, d]."""
    return pool("attn_pool", k, v, p, p.shape[1], block_size, inv_freq)
