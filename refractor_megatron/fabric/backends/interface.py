"""The signature every attention backend implements."""

from __future__ import annotations

from typing import Protocol

import torch

from refractor_megatron.fabric.plan import MaskPlan


class Attention(Protocol):
    """``fabric.attention.tri_tier_attention`` without the checks and the choice of backend."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_far: torch.Tensor | None,
        v_far: torch.Tensor | None,
        plan: MaskPlan,
        scale: float,
    ) -> torch.Tensor:
        """q [b, h, rows, d], k and v [b, h_kv, n_tokens, d], k_far and v_far [b, h_kv, n_far, d] or None -> like q."""
        ...
