"""Lowerings of the mask: dense oracle, block map and tensor-only ``mask_mod``.

The dense oracle is written elementwise from the definition in ``rules`` and shares no code with the interval form, so
that the two check each other; the block map comes from the intervals; ``mask_mod`` is a third, index-wise form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

from refractor_megatron.distinction.intervals import Rows
from refractor_megatron.distinction.roles import SCOPE_BITS
from refractor_megatron.distinction.rules import SCOPES, CompiledRules

#: Longest sample for which an L x L mask may be built.
DENSE_LIMIT = 2048

MaskMod = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def dense_legal(records: torch.Tensor, rules: CompiledRules) -> torch.Tensor:
    """bool [L, L] (query, key): legality of every edge of one sample, records [L, 4], before any window."""
    length = records.shape[0]
    assert records.dim() == 2 and records.shape[1] == 4, tuple(records.shape)
    assert length <= DENSE_LIMIT, f"the dense mask is an oracle for at most {DENSE_LIMIT} tokens, not {length}"
    document, segment, role, bits = records.long().unbind(1)
    kind = role * SCOPES
    for i, bit in enumerate(SCOPE_BITS):
        kind = kind + (bits.bitwise_and(int(bit)) != 0).long() * (1 << i)
    tables = (rules.table, rules.noncausal, rules.shared)
    table, relaxed, shared = (torch.tensor(x, device=records.device) for x in tables)
    position = torch.arange(length, device=records.device)
    same_segment = segment[:, None] == segment[None, :]
    pair = (kind[:, None], kind[None, :])
    causal = (position[None, :] <= position[:, None]) | (relaxed[pair] & same_segment)
    legal = causal & (same_segment | shared[kind][None, :]) & table[pair]
    same_document = (document[:, None] == document[None, :]) & (document[None, :] >= 0)
    return (legal | torch.eye(length, dtype=torch.bool, device=records.device)) & same_document


def dense_mask(records: torch.Tensor, rules: CompiledRules, window: int | None) -> torch.Tensor:
    """bool [L, L]: legal edges of the local tier; ``window`` bounds the distance |q - k| < window."""
    legal = dense_legal(records, rules)
    if window is None:
        return legal
    position = torch.arange(records.shape[0], device=records.device)
    return legal & ((position[:, None] - position[None, :]).abs() < window)


def dense_summary_mask(
    records: torch.Tensor, rules: CompiledRules, window: int | None, block_size: int, summaries_per_block: int
) -> torch.Tensor:
    """bool [L, nb * S]: summaries visible to each query (complete, wholly legal, not wholly inside the window)."""
    length = records.shape[0]
    blocks = length // block_size
    legal = dense_legal(records, rules)
    whole = legal[:, : blocks * block_size].reshape(length, blocks, block_size).all(2)
    q = torch.arange(length, device=records.device)[:, None]
    first = torch.arange(blocks, device=records.device)[None, :] * block_size
    last = first + block_size - 1
    start = torch.zeros_like(q) if window is None else q - window + 1
    visible = whole & (last < q) & (first < start)
    return visible.repeat_interleave(summaries_per_block, dim=1)


def mask_mod(records: torch.Tensor, rules: CompiledRules, window: int | None) -> MaskMod:
    """Closure ``(q_idx, k_idx) -> bool`` over integer tensors of any broadcastable shapes; captures only tensors.

    The form that compiled block-sparse kernels take for their partial tiles.
    """
    document, segment, role, bits = (column.contiguous() for column in records.long().unbind(1))
    kind = role * SCOPES
    for i, bit in enumerate(SCOPE_BITS):
        kind = kind + (bits.bitwise_and(int(bit)) != 0).long() * (1 << i)
    types = torch.tensor(rules.types, device=records.device)
    table = torch.tensor(rules.table, device=records.device).reshape(-1)
    relaxed = torch.tensor(rules.noncausal, device=records.device).reshape(-1)
    shared = torch.tensor(rules.shared, device=records.device)[kind]
    reach = torch.tensor(records.shape[0] if window is None else window, device=records.device)

    def mod(q_idx: torch.Tensor, k_idx: torch.Tensor) -> torch.Tensor:
        same_segment = segment[q_idx] == segment[k_idx]
        pair = kind[q_idx] * types + kind[k_idx]
        causal = (k_idx <= q_idx) | (relaxed[pair] & same_segment)
        legal = table[pair] & causal & (same_segment | shared[k_idx])
        same_document = (document[q_idx] == document[k_idx]) & (document[k_idx] >= 0)
        return (legal | (q_idx == k_idx)) & same_document & ((q_idx - k_idx).abs() < reach)

    return mod


class BlockKind(IntEnum):
    """Class of a (query block, key block) tile."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


@dataclass(frozen=True)
class BlockMap:
    """kind: int8 [nq, nk] of ``BlockKind``; edges: int64 [nq, nk] legal edges of each tile."""

    q_block: int
    k_block: int
    kind: npt.NDArray[np.int8]
    edges: npt.NDArray[np.int64]


def block_map(rows: Rows, n_rows: int, n_keys: int, q_block: int, k_block: int) -> BlockMap:
    """Classifies every tile by interval arithmetic: an exact edge count, without looking at single edges."""
    nq, nk = -(-n_rows // q_block), -(-n_keys // k_block)
    tile_row = rows.row // q_block
    first, last = rows.lo // k_block, (rows.hi - 1) // k_block
    # Cover every touched tile fully (as a difference array), then take back what the two ends do not reach.
    steps = np.bincount(tile_row * (nk + 1) + first, minlength=nq * (nk + 1)).astype(np.int64)
    steps -= np.bincount(tile_row * (nk + 1) + last + 1, minlength=nq * (nk + 1))
    edges = np.cumsum(steps.reshape(nq, nk + 1), axis=1)[:, :nk] * k_block
    surplus = np.bincount(tile_row * nk + first, weights=rows.lo - first * k_block, minlength=nq * nk)
    surplus += np.bincount(tile_row * nk + last, weights=(last + 1) * k_block - rows.hi, minlength=nq * nk)
    edges -= surplus.reshape(nq, nk).astype(np.int64)
    area = np.outer(_sizes(n_rows, q_block), _sizes(n_keys, k_block))
    kind = np.where(edges == area, BlockKind.FULL, np.where(edges > 0, BlockKind.PARTIAL, BlockKind.EMPTY))
    return BlockMap(q_block, k_block, kind.astype(np.int8), edges)


def _sizes(total: int, block: int) -> npt.NDArray[np.int64]:
    return np.minimum(block, total - np.arange(0, total, block)).astype(np.int64)
