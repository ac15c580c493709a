"""Why flex is slower than its visited area allows: the same mask with one thing changed at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from gpu_bench import Bench, Shape, both_ways, inputs_of, sample_of
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, noop_mask

from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.fabric.backends.flex import BLOCK, attend
from refractor_megatron.fabric.backends.flex_mask import FlexMask, Geometry, lower
from refractor_megatron.fabric.plan import MaskPlan, plan_for

#: Seconds that one variant may take, compilation included.
VARIANT_S = 45.0
_SMALL = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64}
_SMALL |= {"bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64}


def diagnose(bench: Bench, shape: Shape, length: int, part: dict[str, Any]) -> None:
    """A row for each variant, while time lasts; ``skipped`` names the others."""
    plan = plan_for(sample_of(length), compile_rules([]), shape.spec(retrieved=False))
    inputs = inputs_of(bench, shape, plan, bench.dtype)
    part |= {"length": length, "rows": [], "skipped": []}
    part["longest_column"] = longest_column(bench, shape, plan)
    for name, mask, options in variants(bench, plan):
        if bench.left() < VARIANT_S and bench.on_gpu:
            part["skipped"].append(name)
            continue
        row: dict[str, Any] = {"variant": name, "visited_pairs": mask.visited_pairs}
        try:
            row |= both_ways(
                bench,
                lambda: attend(inputs, mask, shape.head_dim**-0.5, options),  # noqa: B023
                inputs,
            )
        except Exception as error:  # an option that this torch or this device does not take is an answer too
            row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        part["rows"].append(row)
        bench.save()


def variants(bench: Bench, plan: MaskPlan) -> Iterator[tuple[str, FlexMask, dict[str, Any]]]:
    """(name, mask, kernel options), what tells most first."""
    base = lowered(bench, plan, BLOCK)
    yield "as it is", base, {}
    yield "all tiles, no mask evaluated (wrong results)", without_mask(base), {}
    yield "full tiles only (wrong results)", full_only(base), {}
    yield "backward tiles 64 x 64 and 128 x 64, 2 stages, 8 warps", base, backward(64, 64, 128, 64, 2, 8)
    yield "backward tiles 32 x 128, 2 stages, 8 warps", base, backward(32, 128, 128, 32, 2, 8)
    yield "backward tiles 64 x 64, 2 stages, 8 warps", base, backward(64, 64, 64, 64, 2, 8)
    yield "mask tiles 256", lowered(bench, plan, 256), {}
    yield "mask tiles 64", lowered(bench, plan, 64), _SMALL
    yield "tables of 8 intervals", lowered(bench, plan, BLOCK, (8,)), {}
    yield "bit tiles", lowered(bench, plan, BLOCK, ()), {}
    yield "tensor memory accelerator", base, {"USE_TMA": True}
    yield "scores scaled before the product", base, {"PRESCALE_QK": True}
    if importlib.util.find_spec("flash_attn") is not None:
        yield "BACKEND FLASH", base, {"BACKEND": "FLASH"}


def backward(m1: int, n1: int, m2: int, n2: int, stages: int, warps: int) -> dict[str, Any]:
    """Kernel options of the backward pass: tiles of queries and keys for dK and dV (1), and for dQ (2)."""
    tiles = {"bwd_BLOCK_M1": m1, "bwd_BLOCK_N1": n1, "bwd_BLOCK_M2": m2, "bwd_BLOCK_N2": n2}
    return tiles | {"bwd_num_stages": stages, "bwd_num_warps": warps}


def lowered(bench: Bench, plan: MaskPlan, block: int, sizes: tuple[int, ...] | None = None) -> FlexMask:
    """The plan's mask in tiles of ``block``; sizes: of interval tables, none at all for bit tiles."""
    geometry = Geometry(plan.length, plan.n_far, plan.n_tokens, block)
    given = {} if sizes is None else {"sizes": sizes}
    return lower(plan.samples[:1], len(plan.samples), geometry, bench.device, **given)


def without_mask(mask: FlexMask) -> FlexMask:
    """Visits the same tiles, and asks no mask in any of them."""
    return _unmasked(mask, mask.block_mask.kv_num_blocks, "no mask")


def full_only(mask: FlexMask) -> FlexMask:
    """Visits full tiles alone."""
    return replace(_unmasked(mask, torch.zeros_like(mask.block_mask.kv_num_blocks), "full only"), partial_tiles=0)


def _unmasked(mask: FlexMask, partial: Tensor, name: str) -> FlexMask:
    """The first ``partial`` of the partial tiles of each row, and all full ones, as if everything in them was legal."""
    lists = mask.block_mask
    made = BlockMask.from_kv_blocks(
        partial,
        lists.kv_indices,
        lists.full_kv_num_blocks,
        lists.full_kv_indices,
        BLOCK_SIZE=mask.geometry.block,
        mask_mod=noop_mask,
        seq_lengths=lists.seq_lengths,
    )
    return replace(mask, block_mask=made, shape_class=(name,))


def longest_column(bench: Bench, shape: Shape, plan: MaskPlan) -> dict[str, float | None]:
    """Work of the longest program of the backward kernel.

    One program computes dK and dV of a tile of keys, over all query heads of its group: a tile of summaries is read by
    nearly every later query. With ``programs_in_flight`` of the average size at once, a share above 1 means that the
    rest waits for it.
    """
    lists = lowered(bench, plan, BLOCK).block_mask
    assert lists.q_num_blocks is not None and lists.full_q_num_blocks is not None
    column = (lists.q_num_blocks + lists.full_q_num_blocks).double()
    flight = torch.cuda.get_device_properties(bench.device).multi_processor_count if bench.on_gpu else 1
    group = shape.heads // shape.kv_heads
    longest, total = float(column.max()) * group, float(column.sum()) * shape.heads
    return {"tiles": longest, "programs_in_flight": float(flight), "share_of_fair_part": longest * flight / total}
