"""Lowerings: the oracle's limit, tile classes and the captured tensors of mask_mod."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from refractor_megatron.distinction.intervals import compile_intervals
from refractor_megatron.distinction.lowerings import (
    BlockKind,
    block_map,
    dense_block_mask,
    dense_mask,
    mask_mod,
)
from refractor_megatron.distinction.rules import compile_rules
from tests.masks import sliding

PLAIN = compile_rules([])


def test_dense_mask_of_plain_text_is_a_causal_band() -> None:
    records = torch.zeros(9, 4, dtype=torch.int32)
    ones = torch.ones(9, 9, dtype=torch.bool)
    assert (dense_mask(records, PLAIN, sliding(None)) == ones.tril()).all()
    assert (dense_mask(records, PLAIN, sliding(3)) == ones.tril() & ~ones.tril(-3)).all()


def test_dense_mask_refuses_long_samples() -> None:
    with pytest.raises(AssertionError, match="at most 2048 tokens, not 2049"):
        dense_mask(torch.zeros(2049, 4, dtype=torch.int32), PLAIN, sliding(None))


def test_summaries_of_a_block_share_its_visibility() -> None:
    mask = dense_block_mask(torch.zeros(13, 4, dtype=torch.int32), PLAIN, sliding(2), 4).repeat_interleave(3, 1)
    assert mask.shape == (13, 9)
    assert mask[12].tolist() == [True] * 9 and mask[8].tolist() == [True] * 6 + [False] * 3
    assert not mask[3].any()


def test_block_map_of_a_sliding_window() -> None:
    rows = compile_intervals(np.zeros((512, 4), dtype=np.int32), PLAIN, sliding(256)).rows
    tiles = block_map(rows, 512, 512, 128, 128)
    e, p, f = BlockKind.EMPTY, BlockKind.PARTIAL, BlockKind.FULL
    assert tiles.kind.tolist() == [[p, e, e, e], [f, p, e, e], [p, f, p, e], [e, p, f, p]]
    assert int(tiles.edges.sum()) == rows.count()


def test_block_map_counts_ragged_edges() -> None:
    rows = compile_intervals(np.zeros((10, 4), dtype=np.int32), PLAIN, sliding(None)).rows
    tiles = block_map(rows, 10, 10, 4, 3)
    assert tiles.kind.shape == (3, 4)
    assert tiles.kind[2, 0] == BlockKind.FULL and tiles.kind[2].tolist()[3] == BlockKind.PARTIAL
    assert tiles.edges[2].tolist() == [6, 6, 6, 1]


def test_block_map_of_64k_is_analytic() -> None:
    intervals = compile_intervals(np.zeros((65536, 4), dtype=np.int32), PLAIN, sliding(512))
    tiles = block_map(intervals.rows, 65536, 65536, 128, 128)
    assert int((tiles.kind != BlockKind.EMPTY).sum()) == 5 * 512 - 10
    assert int(tiles.edges.sum()) == intervals.rows.count()


def test_mask_mod_takes_any_broadcastable_indices() -> None:
    records = torch.zeros(6, 4, dtype=torch.int32)
    records[3:, 0] = 1
    mod = mask_mod(records, PLAIN, sliding(2))
    assert bool(mod(torch.tensor(4), torch.tensor(3))) and not bool(mod(torch.tensor(3), torch.tensor(2)))
    assert mod(torch.arange(6)[:, None], torch.arange(6)[None]).shape == (6, 6)
