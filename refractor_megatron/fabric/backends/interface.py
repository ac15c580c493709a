"""What every attention backend takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from refractor_megatron.fabric.plan import MaskPlan


class AttentionInputs(NamedTuple):
    """Tensors of one attention call, all of one dtype, for the batch of b samples of a ``MaskPlan``.

    q: [b, h, rows, d], rows = ``plan.length``; k, v: [b, h_kv, n_tokens, d]; k_far, v_far: [b, h_kv, n_far, d], None
    where the plan has no far keys. h % h_kv == 0: query head i reads key head i // (h / h_kv).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_far: torch.Tensor | None = None
    v_far: torch.Tensor | None = None


#: (inputs, plan, scale) -> out [b, h, rows, d] in the dtype of q: ``fabric.attention.tri_tier_attention`` without its
#: checks and its choice of backend.
Attention = Callable[[AttentionInputs, MaskPlan, float], torch.Tensor]
