"""The layout of visits: every legal edge once, shared masks, few needless pairs, memory that follows the length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from refractor_megatron.distinction.generators import random_records
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.fabric import layout as layout_module
from refractor_megatron.fabric import tree
from refractor_megatron.fabric.backends import AttentionInputs
from refractor_megatron.fabric.backends.blocksparse_cpu import blocksparse_attention, matmul_kernel
from refractor_megatron.fabric.layout import Layout
from refractor_megatron.fabric.plan import MaskPlan, clear_plans, plan_for
from refractor_megatron.fabric.spec import MaskSpec, RetrievedSpec, SummarySpec
from tests.masks import spec_of

PLAIN = compile_rules([])
SEALED = compile_rules([{"name": "s", "when": {"bits": ["SAFETY_SCOPE"]}, "allow_write_to": []}])
TRI_TIER = MaskSpec(LocalPattern(window=512), SummarySpec(128, 2), RetrievedSpec(128, 20))


@pytest.fixture(autouse=True)
def fresh() -> None:
    clear_plans()


def plain(length: int, spec: MaskSpec = TRI_TIER, batch: int = 1) -> MaskPlan:
    """Plan of one plain document a sample; every chunk has found as many records as it may."""
    records = torch.zeros(batch, length, 4 + (spec.retrieved.fan_in if spec.retrieved else 0), dtype=torch.int32)
    records[:, :, 2] = 5
    return plan_for(records, PLAIN, spec, policies=np.full(1, 3, dtype=np.uint8))


def edges(layout: Layout) -> torch.Tensor:
    """int [batch, rows, far + tokens]: how often the visits let each edge through."""
    seen = torch.zeros(layout.batch, layout.rows, layout.n_far + layout.n_tokens, dtype=torch.int32)
    for i, visit in enumerate(layout.visits):
        keys = [torch.arange(lo, hi) for lo, hi in visit.far]
        keys += [torch.arange(lo, hi) + layout.n_far for lo, hi in visit.tokens]
        legal = torch.from_numpy(layout.legal(i)).int()
        for sample in range(*visit.samples):
            table = sample - visit.samples[0] if len(legal) > 1 else 0
            seen[sample, visit.first : visit.last, torch.cat(keys)] += legal[table]
    return seen


@pytest.mark.parametrize("core", [1, 16, 64])
@pytest.mark.parametrize("union", [0.0, 1.5, 1e9])
def test_visits_cover_every_legal_edge_once(core: int, union: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether samples are visited together or one by one, and however much the trees take."""
    monkeypatch.setattr(layout_module, "_UNION", union)
    monkeypatch.setattr(layout_module, "_SMALL", 0)
    monkeypatch.setattr(tree, "CORE", core)
    rng = np.random.default_rng(0)
    records = torch.from_numpy(np.stack([random_records(rng, 300, documents=2, padding=False) for _ in range(3)]))
    for spec in (spec_of(24, 8, 2), spec_of(None)):
        plan = plan_for(records, SEALED, spec)
        together = [visit.samples == (0, 3) for visit in plan.layout.visits]
        assert all(together) if union == 1e9 else not any(together) if union == 0.0 else True
        assert torch.equal(edges(plan.layout), plan.dense(torch.device("cpu")).int())


def test_a_dense_prefix_is_visited_in_tall_unmasked_calls() -> None:
    """2048 rows of full causal attention: 16 masked visits along the diagonal, everything else without a mask."""
    visits = plain(2048, spec_of(None)).layout.visits
    masked = [visit for visit in visits if visit.mask is not None]
    assert len(masked) == 16 and all(visit.opens and visit.keys <= 256 for visit in masked)
    assert len({id(visit.mask) for visit in masked}) <= 4
    tall = [visit for visit in visits if visit.mask is None]
    assert max(visit.last - visit.first for visit in tall) == 1024 and not any(visit.opens for visit in tall)
    assert sum(visit.pairs for visit in visits) <= 2048 * 2049 // 2 + 2048 * (64 + tree.ALIGN)


def test_equal_leaves_share_a_mask() -> None:
    """The number of masks does not grow with the document."""
    counts = [len({id(visit.mask) for visit in plain(length).layout.visits}) for length in (8192, 16384)]
    assert counts[0] == counts[1] <= 64


def test_visits_follow_the_window_not_the_length() -> None:
    per_query = [plain(length, spec_of(512)).layout.visited_pairs / length for length in (4096, 16384)]
    assert per_query[1] == pytest.approx(512 + 128, rel=0.02) and per_query[0] < per_query[1]


@pytest.mark.parametrize("length", [700, 2048, 5000, 16384])
@pytest.mark.parametrize(
    "spec",
    [TRI_TIER, spec_of(64, 32, 1), spec_of(300), spec_of(None), MaskSpec(LocalPattern("dilated", 512, 4))],
    ids=["tri-tier", "narrow", "window", "dense", "dilated"],
)
def test_visited_pairs_stay_near_the_legal_edges(spec: MaskSpec, length: int) -> None:
    plan = plain(length, spec)
    legal, visited = plan.stats.legal_edges, plan.layout.visited_pairs
    assert legal <= visited <= 1.35 * legal + plan.layout.q_block * length


def test_biases_are_kept_only_while_small(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (plain(length, spec_of(16, 8, 2)).layout for length in (64, 65))
    mask = small.visits[0].mask
    assert mask is not None
    assert small.bias(mask, torch.float32, 1) is small.bias(mask, torch.float32, 1)
    monkeypatch.setattr(layout_module, "_CACHED_BIAS", 10)
    mask = large.visits[0].mask
    assert mask is not None
    first, second = large.bias(mask, torch.float32, 2), large.bias(mask, torch.float32, 2)
    assert first is not second and torch.equal(first, second)
    assert first.shape == (1, 1, 2 * mask.rows, large.visits[0].keys)


class Counter(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.largest = max(self.largest, tensor.numel())
        return result


def test_memory_follows_the_length() -> None:
    """Twice the rows: at most twice the largest tensor of forward and backward, and twice what is kept between them."""
    largest, saved = [], []
    for length in (1024, 2048):
        plan = plain(length)
        leaves = [torch.zeros(1, 1, n, 8, requires_grad=True) for n in (*[length] * 3, *[plan.n_far] * 2)]
        with Counter() as counter:
            out = blocksparse_attention(matmul_kernel())(AttentionInputs(*leaves), plan, 1.0)
            saved.append(sum(t.numel() for t in out.grad_fn.saved_tensors))  # type: ignore[union-attr]
            torch.autograd.backward(out, torch.ones_like(out))
        largest.append(counter.largest)
    assert largest[1] <= 2 * largest[0] and saved[1] <= 2 * saved[0]


def test_a_layout_is_as_large_as_its_intervals() -> None:
    sizes = []
    for length in (8192, 16384):
        visits = plain(length).layout.visits
        masks = {id(visit.mask): visit.mask for visit in visits if visit.mask is not None}
        sizes.append(len(visits) + sum(mask.pieces.size + mask.rows * mask.keys for mask in masks.values()))
    assert sizes[1] <= 2 * sizes[0]
