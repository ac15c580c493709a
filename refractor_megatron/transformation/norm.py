"""RMSNorm for Megatron layer specs: y = a · x / sqrt(mean(x²) + ε) (spec section 5)."""

from __future__ import annotations

from typing import Any

import torch


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor that layer specs call.

    Megatron's own torch wrapper refuses sequence parallelism; marking the weight is all that it takes, so that
    ``finalize_model_grads`` adds up its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  Megatron reads it
