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
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.roles import SCOPE_BITS
from refractor_megatron.distinction.rules import SCOPES, CompiledRules

#: Longest sample for which an L x L mask may be built.
DENSE_LIMIT = 2048

MaskMod = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def dense_legal(records: torch.Tensor, rules: CompiledRules) -> torch.Tensor:
    """bool [L, L] (query, key): legality of every edge of one sample, records [L, >= 4], before any pattern."""
    length = records.shape[0]
    assert records.dim() == 2 and records.shape[1] >= 4, tuple(records.shape)
    assert length <= DENSE_LIMIT, f"the dense mask is an oracle for at most {DENSE_LIMIT} tokens, not {length}"
    document, segment, role, bits = records[:, :4].long().unbind(1)
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


def dense_mask(records: torch.Tensor, rules: CompiledRules, pattern: LocalPattern) -> torch.Tensor:
    """bool [L, L]: legal edges of the local tier."""
    position = torch.arange(records.shape[0], device=records.device)
    return dense_legal(records, rules) & pattern.allows(position[:, None], position[None, :])


def dense_block_mask(
    records: torch.Tensor, rules: CompiledRules, pattern: LocalPattern, block_size: int, behind: int = 0
) -> torch.Tensor:
    """bool [L, L // block_size]: blocks of which a query may read a summary.

    Complete (every token before the query, and ``behind`` whole blocks between), wholly legal, and not read in full by
    the local tier.
    """
    length = records.shape[0]
    blocks = length // block_size
    tokens = torch.arange(length, device=records.device)
    shape = (length, blocks, block_size)
    whole = dense_legal(records, rules)[:, : blocks * block_size].reshape(shape).all(2)
    near = pattern.allows(tokens[:, None], tokens[None, : blocks * block_size]).reshape(shape).all(2)
    last = (torch.arange(blocks, device=records.device) + 1) * block_size - 1
    complete = last[None, :] < (tokens // block_size - behind)[:, None] * block_size
    return whole & complete & ~near


def mask_mod(records: torch.Tensor, rules: CompiledRules, pattern: LocalPattern) -> MaskMod:
    """Closure ``(q_idx, k_idx) -> bool`` over integer tensors of any broadcastable shapes.

    The audit judges single edges with it. Kernels do not: they take forms that follow the intervals.
    """
    document, segment, role, bits = (column.contiguous() for column in records[:, :4].long().unbind(1))
    kind = role * SCOPES
    for i, bit in enumerate(SCOPE_BITS):
        kind = kind + (bits.bitwise_and(int(bit)) != 0).long() * (1 << i)
    types = torch.tensor(rules.types, device=records.device)
    table = torch.tensor(rules.table, device=records.device).reshape(-1)
    relaxed = torch.tensor(rules.noncausal, device=records.device).reshape(-1)
    shared = torch.tensor(rules.shared, device=records.device)[kind]

    def mod(q_idx: torch.Tensor, k_idx: torch.Tensor) -> torch.Tensor:
        same_segment = segment[q_idx] == segment[k_idx]
        pair = kind[q_idx] * types + kind[k_idx]
        causal = (k_idx <= q_idx) | (relaxed[pair] & same_segment)
        legal = table[pair] & causal & (same_segment | shared[k_idx])
        same_document = (document[q_idx] == document[k_idx]) & (document[k_idx] >= 0)
        return (legal | (q_idx == k_idx)) & same_document & pattern.allows(q_idx, k_idx)

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
