"""Block-sparse attention on the GPU by ``torch.nn.attention.flex_attention``; on the CPU its dense forward, an oracle.

CUDA: forward and backward are one Triton kernel each, compiled once for every class of shapes and masks. A kernel is
never compiled again because a mask changed (see ``flex_mask``), and never replaced by the uncompiled function, which
would build the whole score matrix: more than eight compilations of one class are an error (``fullgraph``).

CPU: torch has no backward for flex there, and its uncompiled forward evaluates ``mask_mod`` for every pair and ignores
the block lists; that makes it an independent check of ``mask_mod``, up to the dense oracle's length.

Kernel options, and why they are as they are:

- Tiles of 128 x 128: a multiple of every tile that torch's tuned configurations use (H100, bf16, d = 128: 128 x 64
  forward, 64 x 128 and 128 x 64 backward), and the summarised block of the default configuration.
- ``BACKEND`` is torch's choice (Triton). ``FLASH`` needs an extra package and new GPUs: an option to try, measured by
  ``tools/gpu_check.py attention``.
- ``ROWS_GUARANTEED_SAFE`` stays off. It promises a legal key in the *first* tile a row visits, which a row that reads
  only the end of that tile breaks: NaN.
- float32 means float32 (``FLOAT32_PRECISION`` ieee), also where TF32 is allowed for matrix products: the backends agree
  to 1e-5 there.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as library
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from refractor_megatron.distinction.intervals import IntArray
from refractor_megatron.distinction.rules import BoolTable
from refractor_megatron.fabric.backends.flex_mask import FlexMask, flex_mask
from refractor_megatron.fabric.backends.interface import Attention, AttentionInputs
from refractor_megatron.fabric.plan import MaskPlan

_log = logging.getLogger(__name__)

#: Queries and keys of a tile.
BLOCK = 128
#: Torch's switch for running flex attention as it is written.
_UNCOMPILED = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
#: The kernel's matrix products take no narrower head.
MIN_HEAD_DIM = 16

_Call = Callable[[Tensor, Tensor, Tensor, BlockMask, float, Any], Tensor]
_compiled: dict[tuple[object, ...], _Call] = {}


def flex_backend(block: int = BLOCK, options: Mapping[str, Any] | None = None) -> Attention:
    """The backend function with tiles of ``block``; options: flex attention's ``kernel_options`` (CUDA)."""

    def attention(x: AttentionInputs, plan: MaskPlan, scale: float) -> Tensor:
        return attend(x, flex_mask(plan, x.q.device, block), scale, options)

    return attention


def attend(x: AttentionInputs, mask: FlexMask, scale: float, options: Mapping[str, Any] | None = None) -> Tensor:
    """Attention under a lowered mask."""
    joint = mask.geometry
    rows, keys, values = joint.pad_rows(x.q), joint.join_keys(x.k_far, x.k), joint.join_keys(x.v_far, x.v)
    if x.q.device.type != "cuda":
        return _uncompiled(rows, keys, values, mask.block_mask, scale)[:, :, : joint.rows]
    given = {"FLOAT32_PRECISION": "'ieee'", **(options or {})}
    call = _compiled_for(rows, keys, (*mask.shape_class, joint.block, *sorted(given.items())))
    return call(rows, keys, values, mask.block_mask, scale, given)[:, :, : joint.rows]


def visited_pairs(plan: MaskPlan, device: torch.device) -> int:
    """``Backend.visited_pairs``: those of the listed tiles. (The CPU's dense forward computes all pairs.)"""
    return flex_mask(plan, device, BLOCK).visited_pairs


def executed(plan: MaskPlan, sample: int, rows: IntArray, device: torch.device) -> BoolTable:
    """``Backend.executed``: read back from the lists and tables that the kernel takes. (The CPU ignores the lists.)"""
    return flex_mask(plan, device, BLOCK).edges(sample, rows)


def missing(device: torch.device) -> str | None:
    """What this process lacks to compile for ``device``, or None."""
    if device.type != "cuda":
        return None if hasattr(library, _UNCOMPILED) else "needs a newer torch, whose flex attention runs uncompiled"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed (pip install triton)"
    if torch._dynamo.config.disable:
        return "needs torch.compile, which TORCHDYNAMO_DISABLE turns off"
    return None


def _attend(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float, options: Any) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=gqa, kernel_options=options)


def _compiled_for(q: Tensor, k: Tensor, mask_class: tuple[object, ...]) -> _Call:
    """The compiled function of a class of shapes.

    Dynamo keeps its entries, and counts recompilations (eight at most), by code object: each class gets a code object
    of its own. Guards still decide within a class: on strides, and on what requires a gradient.
    """
    key = (q.shape, k.shape, q.dtype, q.device, torch.is_grad_enabled(), mask_class)
    if key not in _compiled:
        _log.info("compiling flex attention: q %s, k %s, %s, mask %s", *map(str, (*key[:3], mask_class)))
        copy = FunctionType(_attend.__code__.replace(), _attend.__globals__, _attend.__name__)
        _compiled[key] = torch.compile(copy, dynamic=False, fullgraph=True)
    return _compiled[key]


def _uncompiled(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    """The dense form. Called as it is, flex attention would still trace itself, which torch's own switch prevents."""
    before = getattr(library, _UNCOMPILED)
    setattr(library, _UNCOMPILED, True)
    try:
        return _attend(q.detach(), k.detach(), v.detach(), block_mask, scale, {})
    finally:
        setattr(library, _UNCOMPILED, before)
