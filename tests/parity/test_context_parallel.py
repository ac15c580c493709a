"""Context parallelism in the model: Megatron's shards are ours, the attention layer with all its tiers, whole grids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from refractor_megatron.cli import main
from refractor_megatron.compat import cpu_runtime
from refractor_megatron.distinction.generators import random_records, random_rules
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.roles import ROLE_ID
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.fabric.context_parallel import local_shard, part_of
from refractor_megatron.fabric.retrieval import RetrievalBank
from refractor_megatron.fabric.spec import ContextPart, MaskSpec, RetrievedSpec, SummarySpec
from refractor_megatron.training.parity import parse_grid
from tests.corpus import write_corpus
from tests.ranks import in_threads
from tests.warm import warm_ranks

SLIDING, HYBRID = LocalPattern("sliding", 14), LocalPattern("hybrid", 8, 2, 4)
RETRIEVED = RetrievedSpec(chunk=8, fan_in=3)
#: name -> (mask, pooling, combine)
LAYERS: dict[str, tuple[MaskSpec, Any, Any]] = {
    "three tiers": (MaskSpec(SLIDING, SummarySpec(4, 2), RETRIEVED), "attn_pool", "joint"),
    "two levels, gated": (MaskSpec(SLIDING, SummarySpec(4, 2, 2, 3), RETRIEVED), "attn_pool", "gated"),
    "maxima of two levels, hybrid, sum": (MaskSpec(HYBRID, SummarySpec(4, 1, 2, 2)), "max", "sum"),
    "means": (MaskSpec(HYBRID, SummarySpec(8, 2), RETRIEVED), "mean", "joint"),
}


@dataclass(frozen=True)
class Place:
    """A process group that is never asked to communicate."""

    number: int = 0
    count: int = 1

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.count


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_attention_layer_of_all_ranks_is_that_of_one(name: str, size: int) -> None:
    """Outputs and the gradients of queries, keys, values and every weight, fp64."""
    cpu_runtime.install()
    from refractor_megatron.transformation.core_attention import TriTierCoreAttention
    from refractor_megatron.transformation.layer_plan import AttentionPlan, RotaryPlan

    mask, pooling, combine = LAYERS[name]
    length, batch = 2 * size * 16, 2
    rng = np.random.default_rng(size)
    rules = compile_rules(random_rules(rng, causal=True))
    bank = RetrievalBank(
        torch.from_numpy(rng.standard_normal((20, 6)).astype(np.float32)), rng.integers(0, 4, 20).astype(np.uint8), "x"
    )
    records = np.stack([random_records(rng, length, documents=1, padding=False) for _ in range(batch)])
    records[0] = (0, 0, ROLE_ID["data"], 0)  # one plain document, where every tier is read
    ids = np.sort(rng.integers(-1, 20, (batch, length // 8, 3)).astype(np.int32))[..., ::-1].repeat(8, axis=1)
    mask_records = torch.from_numpy(np.concatenate([records, ids], axis=2))
    plan = AttentionPlan(
        heads=4,
        kv_heads=2,
        head_dim=8,
        mask=mask,
        pooling=pooling,
        record_dim=6,
        combine=combine,
        linear=None,
        backend="dense",
        rotary=RotaryPlan(1e4, 1.0, 6, "linear", length, 0.0, 0.0),
    )
    data = [torch.from_numpy(rng.standard_normal((length, batch, heads, 8))) for heads in (4, 2, 2)]
    upstream = torch.from_numpy(rng.standard_normal((length, batch, 32)))

    def attend(group: Any) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]:
        part = part_of(group)
        config = SimpleNamespace(params_dtype=torch.float64)
        groups = SimpleNamespace(cp=group, tp=Place())
        layer = TriTierCoreAttention(config, 1, pg_collection=groups, plan=plan, rules=rules, bank=bank, seed=0)
        generator = torch.Generator().manual_seed(0)
        for weight in layer.parameters():
            weight.data.normal_(generator=generator)
        local = [local_shard(x, 0, part).clone().requires_grad_() for x in data]
        out = layer(*local, mask_records)
        out.backward(local_shard(upstream, 0, part))
        weights = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in layer.named_parameters()}
        return out.detach(), [x.grad for x in local], weights

    out, gradients, weights = attend(Place())
    found = in_threads(size, attend)
    for n, (part_out, part_gradients, _) in enumerate(found):
        for ours, theirs in zip([part_out, *part_gradients], [out, *gradients], strict=True):
            torch.testing.assert_close(ours, local_shard(theirs, 0, ContextPart(n, size)), rtol=0, atol=1e-12)
    for key, expected in weights.items():
        assert expected.any(), f"{key} must matter"
        torch.testing.assert_close(sum(part[2][key] for part in found), expected, rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.timeout(900)
def test_grids_equal_one_rank(tmp_path: Path) -> None:
    """Eight chunks of one window each at CP4, with experts, summaries and the entropy loss of the router."""
    out = tmp_path / "parity.json"
    arguments = ["parity", "--corpus", str(write_corpus(tmp_path / "text")), "--data-root", str(tmp_path / "data")]
    arguments += ["train.seq_len=256", "model.context_max=256", "train.optimizer.lr=1e-3"]
    arguments += ["train.schedule.cosine.min_lr=1e-4", "router.lb.lambda_ent=0.1"]
    with warm_ranks():
        assert main([*arguments, "--grids", "cp2,cp4,tp2cp2", "--steps", "10", "--out", str(out)]) == 0
    table = json.loads(out.read_text())["grids"]
    assert {name: row["ranks"] for name, row in table.items()} == {"cp2": 2, "cp4": 4, "tp2cp2": 4}
    for name, row in table.items():
        assert row["loss"] <= 1e-5 and row["gradient"] <= 1e-4 and row["norm"] <= 1e-4, (name, row)


def test_megatron_gives_a_shard_the_angles_of_our_positions() -> None:
    """Rotary angles are cut by Megatron, tokens and masks by us: both must mean the same two chunks, in one order."""
    cpu_runtime.install()
    from refractor_megatron.compat.megatron import get_pos_emb_on_this_cp_rank

    angles = torch.randn(48, 1, 1, 4)
    for size in (2, 3, 4):
        for rank in range(size):
            theirs = get_pos_emb_on_this_cp_rank(angles, 0, Place(rank, size))
            assert torch.equal(theirs, local_shard(angles, 0, ContextPart(rank, size)))


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("cp4", {"cp": 4, "ranks": 4}),
        ("tp2cp2", {"tp": 2, "cp": 2, "ranks": 4}),
        ("dp2pp2cp2", {"pp": 2, "cp": 2, "ranks": 8}),
        ("cp2ep2", {"cp": 2, "ep": 2, "ranks": 2}),  # experts are spread over the ranks of a sequence
        ("cp2ep4", {"cp": 2, "ep": 4, "ranks": 4}),
    ],
)
def test_ranks_of_a_grid(text: str, sizes: dict[str, int]) -> None:
    assert parse_grid(text) == sizes
