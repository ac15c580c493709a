"""Gating features: what a token's record says to the learned gates (spec sections 2 and 3, ``gate_feat``).

The expert router, the gates of the attention tiers and the tool router all read this one vector.
"""

from __future__ import annotations

import torch

from refractor_megatron.distinction.roles import ROLES, SCOPE_BITS

#: Names of the features, in order: one for each role, one for each scope bit.
GATE_FEATURES: tuple[str, ...] = (*ROLES, *(str(bit.name) for bit in SCOPE_BITS))


def gate_features(records: torch.Tensor) -> torch.Tensor:
    """float32 [..., K_g], one-hot role and scope bits, of records [..., >= 4] (document, segment, role, bits)."""
    role, bits = records[..., 2], records[..., 3]
    roles = torch.arange(len(ROLES), device=records.device, dtype=role.dtype)
    scopes = torch.tensor([int(bit) for bit in SCOPE_BITS], device=records.device, dtype=bits.dtype)
    return torch.cat([role[..., None] == roles, (bits[..., None] & scopes) != 0], dim=-1).float()
