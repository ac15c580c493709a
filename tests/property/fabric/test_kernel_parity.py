"""The block-sparse kernels equal the dense oracle on masks that no rule would make: any rows, far keys and tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.distinction.intervals import Rows
from refractor_megatron.fabric import layout, tree
from refractor_megatron.fabric.backends import AttentionInputs
from refractor_megatron.fabric.backends.blocksparse_cpu import (
    Kernel,
    _forward,
    blocksparse_attention,
    flash_kernel,
    matmul_kernel,
)
from refractor_megatron.fabric.backends.dense import dense_attention
from refractor_megatron.fabric.joint import SampleKeys
from refractor_megatron.fabric.layout import build_layout

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
KERNELS = {"flash": flash_kernel(), "matmul": matmul_kernel()}
Mask = npt.NDArray[np.bool_]


def random_mask(rng: np.random.Generator, rows: int, keys: int) -> Mask:
    """Tiles of equal value and a staircase, so that cores, partial tiles, dead rows and dead keys all occur."""
    tall, wide = (int(rng.integers(1, 40)) for _ in range(2))
    tiles = rng.random((-(-rows // tall), -(-keys // wide))) < rng.choice([0.1, 0.6, 0.95])
    mask = np.repeat(np.repeat(tiles, tall, 0)[:rows], wide, 1)[:, :keys]
    if rng.random() < 0.5:
        mask &= np.arange(keys)[None] <= np.arange(rows)[:, None] * keys / rows
    return mask & (rng.random((rows, 1)) < 0.95)


def sample_of(mask: Mask, n_far: int) -> SampleKeys:
    """Intervals of a mask; none runs from the far keys into the tokens."""
    rows, starts, stops = [], [], []
    for base, part in ((0, mask[:, :n_far]), (n_far, mask[:, n_far:])):
        step = np.diff(np.pad(part.astype(np.int8), ((0, 0), (1, 1))), axis=1)
        row, lo = np.nonzero(step == 1)
        rows.append(row)
        starts.append(lo + base)
        stops.append(np.nonzero(step == -1)[1] + base)
    row, lo, hi = (np.concatenate(parts) for parts in (rows, starts, stops))
    order = np.lexsort((lo, row))
    return SampleKeys(Rows(row[order], lo[order], hi[order]), np.flatnonzero(~mask.any(1)), int(mask.sum()))


def plan_of(masks: list[Mask], n_far: int, q_block: int) -> Any:
    """What the backends read of a plan."""
    rows, keys = masks[0].shape
    samples = [sample_of(mask, n_far) for mask in masks]
    laid = build_layout(samples, rows, n_far, keys - n_far, q_block)
    assert sum(int(mask.sum()) for mask in masks) <= laid.visited_pairs
    return SimpleNamespace(layout=laid, dense=lambda device: torch.from_numpy(np.stack(masks)).to(device))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    rows=st.integers(1, 300),
    n_far=st.integers(0, 90),
    n_tokens=st.integers(1, 300),
    group=st.integers(1, 8),
    q_block=st.sampled_from([16, 32, 128]),
    core=st.sampled_from([1, 16, 64]),
    gap=st.sampled_from([0, 32]),
    union=st.sampled_from([0.0, 1.5, 1e9]),
)
def test_forward_and_gradients(
    kernel: str,
    dtype: torch.dtype,
    seed: int,
    batch: int,
    rows: int,
    n_far: int,
    n_tokens: int,
    group: int,
    q_block: int,
    core: int,
    gap: int,
    union: float,
) -> None:
    rng = np.random.default_rng(seed)
    chosen = KERNELS[kernel]
    assert isinstance(chosen, Kernel), "this torch lacks the flash op"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_UNION", union)
        patch.setattr(layout, "_SMALL", 0)
        patch.setattr(tree, "CORE", core)
        patch.setattr(tree, "GAP", gap)
        plan = plan_of([random_mask(rng, rows, n_far + n_tokens) for _ in range(batch)], n_far, q_block)
    heads, width = int(rng.integers(1, 3)), 8
    shapes = [(batch, heads * group, rows, width)] + [(batch, heads, n, width) for n in (n_tokens,) * 2 + (n_far,) * 2]
    data = [torch.from_numpy(rng.standard_normal(shape)).to(dtype) for shape in shapes[: 5 if n_far else 3]]
    grad = torch.from_numpy(rng.standard_normal(shapes[0])).to(dtype)
    results = []
    for attention in (blocksparse_attention(chosen), dense_attention):
        leaves = [x.clone().requires_grad_() for x in data]
        out = attention(AttentionInputs(*leaves), plan, 0.3)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for name, ours, oracle in zip(("out", "q", "k", "v", "k_far", "v_far"), *results):  # noqa: B905
        error = float((ours - oracle).detach().abs().max())
        assert error <= TOLERANCE[dtype] * max(1.0, float(oracle.detach().abs().max())), (name, error)
    dead = ~plan.dense("cpu").any(-1)
    assert not results[0][0].transpose(1, 2)[dead].any() and not results[0][1].transpose(1, 2)[dead].any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 150), n_far=st.integers(1, 80), group=st.integers(1, 3))
def test_tiers_weighted_by_their_log_sum_exp_are_the_joint_softmax(
    seed: int, rows: int, n_far: int, group: int
) -> None:
    """Attention over each part of the keys alone, merged with gate = softmax(log-sum-exp), is attention over all."""
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, rows, n_far + rows)
    far = np.arange(n_far + rows) < n_far
    shapes = [(1, 2 * group, rows, 8), *((1, 2, n, 8) for n in (rows, rows, n_far, n_far))]
    x = AttentionInputs(*(torch.from_numpy(rng.standard_normal(shape)) for shape in shapes))
    kernel = flash_kernel() or matmul_kernel()
    joint, whole = _forward(x, plan_of([mask], n_far, 32).layout, 0.3, kernel)
    parts = [_forward(x, plan_of([mask & tier], n_far, 32).layout, 0.3, kernel) for tier in (far, ~far)]
    lse = torch.stack([part[1] for part in parts])
    assert torch.allclose(torch.logsumexp(lse, 0), whole, rtol=0, atol=1e-12)
    gate = torch.nan_to_num(torch.softmax(lse, 0))[..., None]
    assert torch.allclose((gate * torch.stack([part[0] for part in parts])).sum(0), joint, rtol=0, atol=1e-12)
    assert torch.equal(whole == float("-inf"), torch.from_numpy(~mask.any(1)).expand_as(whole))
