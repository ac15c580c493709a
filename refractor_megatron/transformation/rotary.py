"""Rotary positions: frequencies for an extended context, and angles that stay exact far out (spec section 3)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..fabric.context_parallel import local_shard, part_of


def inv_freq_and_scale(
    theta: float,
    alpha: float,
    dim: int,
    scaling: Literal["linear", "yarn"] = "linear",
    context_max: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> tuple[Tensor, float]:
    """Angles per position, float64 [dim / 2], and the factor on cosines and sines (of queries and of keys).

    alpha in (0, 1]: trained length over extended length. ``linear`` is position interpolation (Chen et al. 2023): every
    angle times alpha. ``yarn`` is NTK-by-parts (Peng et al. 2023, arXiv 2309.00071) from an original length of
    ``context_max * alpha`` tokens: features that turn more than ``beta_fast`` times within it keep their angle, those
    that turn less than ``beta_slow`` times are interpolated, with a ramp between; and the attention temperature is
    corrected by 0.1 ln(1 / alpha) + 1. ``dim``: rotated width of a head; ``theta``: base of the angles.
    """
    assert dim % 2 == 0 and 0 < alpha <= 1 and theta > 1, (dim, alpha, theta)
    plain = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if scaling == "linear":
        return plain * alpha, 1.0
    assert context_max > 0 and beta_fast >= beta_slow > 0, (context_max, beta_fast, beta_slow)
    low = math.floor(_feature_turning(beta_fast, theta, dim, context_max * alpha))
    high = math.ceil(_feature_turning(beta_slow, theta, dim, context_max * alpha))
    low, high = max(low, 0), min(high, dim - 1)
    # A ramp of no width is a step; upstream implementations widen it by the same amount.
    ramp = (torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    return plain * (1 - interpolated + alpha * interpolated), 1.0 - 0.1 * math.log(alpha)


def _feature_turning(turns: float, theta: float, dim: int, length: float) -> float:
    """Index (a real number) of the feature that turns ``turns`` times within ``length`` tokens."""
    return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))


def rotary_angles(length: int, inv_freq: Tensor, offset: int = 0) -> Tensor:
    """Angles of positions offset .. offset + length - 1 in the form Megatron takes: float32 [length, 1, 1, 2 r].

    inv_freq: float64 [r]. Products are taken in float64 and whole turns are removed before rounding, so an angle is off
    by at most 2e-7 at any position. Megatron's own float32 products are off by up to 5e-3 rad at 64k and 2e-2 at 256k.
    """
    position = torch.arange(offset, offset + length, dtype=torch.float64, device=inv_freq.device)
    angles = torch.outer(position, inv_freq.double())
    turn = 2 * math.pi
    reduced = (angles - turn * torch.round(angles / turn)).float()
    return torch.cat([reduced, reduced], dim=-1)[:, None, None, :]


class RotaryAngles(torch.nn.Module):
    """Takes the place of ``GPTModel.rotary_pos_emb``: exact angles of any frequencies, for this rank's tokens.

    Under context parallelism a rank gets the positions of its two zig-zag chunks. ``inv_freq`` is no buffer, because
    ``module.bfloat16()`` would round it.
    """

    def __init__(self, inv_freq: Tensor, cp_group: Any = None) -> None:
        super().__init__()
        self.inv_freq, self.cp_group = inv_freq, cp_group
        self._last: Tensor | None = None

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """float32 [max_seq_len / cp, 1, 1, dim] angles, as ``RotaryEmbedding.forward`` returns them."""
        assert offset == 0 and not packed_seq and cp_group is None, (
            "sequences are whole: documents are a matter of masks"
        )
        if self._last is None or self._last.shape[0] != max_seq_len:
            device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
            self._last = rotary_angles(max_seq_len, self.inv_freq.to(device))
        return self._last if self.cp_group is None else local_shard(self._last, 0, part_of(self.cp_group))

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Tensor,
        transformer_config: Any,
        packed_seq_params: Any = None,
    ) -> int:
        """Tokens of the whole sequence, from the hidden states [s, b, h] that enter this pipeline stage."""
        assert inference_context is None and packed_seq_params is None
        given = transformer.input_tensor if transformer.input_tensor is not None else transformer_input
        tokens = int(given.shape[0]) * int(transformer_config.context_parallel_size)
        return (
            tokens * int(transformer_config.tensor_model_parallel_size)
            if transformer_config.sequence_parallel
            else tokens
        )
