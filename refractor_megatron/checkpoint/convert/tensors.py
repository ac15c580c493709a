"""Bytes, types and sanity of single tensors."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError

#: Types of weights that conversion knows, by their names in safetensors headers.
DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: What ``--dtype`` calls them.
CHOICES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: Weights that may be zero throughout: they start at zero and a run need not touch them.
MAY_BE_ZERO = (
    "role_embeddings.weight",
    "tokentype_embeddings.weight",
    "tier_gate_bias",
    "tier_gate_weight",
    "feature_weight",
    ".padding",
)


def dtype_name(dtype: torch.dtype, tensor: str) -> str:
    """Name of ``dtype`` in a safetensors header.

    Raises:
        CheckpointError: weights of this type cannot be converted.
    """
    if dtype not in DTYPE_NAMES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPE_NAMES)
        raise CheckpointError(
            f"tensor {tensor} has dtype {str(dtype).removeprefix('torch.')}, and conversion knows {known}: "
            "save the weights in one of them."
        )
    return DTYPE_NAMES[dtype]


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, without a copy."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def sha256(tensor: Tensor) -> str:
    """Digest of a tensor's bytes."""
    return hashlib.sha256(raw(tensor.contiguous())).hexdigest()


def check_numbers(tensor: Tensor, name: str, where: str) -> None:
    """Refuse weights that no training leaves behind: not finite, or zero throughout where that means *missing*.

    Converters elsewhere have written all-zero models with nothing but a warning. An all-zero projection, norm or
    embedding is such a one. The tables and gates of ``MAY_BE_ZERO`` are exempt.

    Raises:
        CheckpointError: names the tensor.
    """
    low, high = (float(x) for x in torch.aminmax(tensor.detach().reshape(-1)))
    if not (low > float("-inf") and high < float("inf")):  # also false for NaN
        raise CheckpointError(f"tensor {name} of {where} holds a number that is not finite: the weights are damaged.")
    if low == high == 0.0 and not name.endswith(MAY_BE_ZERO):
        raise CheckpointError(f"tensor {name} of {where} is zero throughout: it was lost before this conversion.")
