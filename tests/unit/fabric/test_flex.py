"""The flex backend: its CPU forward against the oracle, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from refractor_megatron.distinction.generators import random_records, random_rules
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.errors import CapabilityError
from refractor_megatron.fabric import plan_for, tri_tier_attention
from refractor_megatron.fabric.backends import AttentionInputs, Capabilities, flex, registry, resolve, selftest
from refractor_megatron.fabric.backends.dense import dense_attention
from refractor_megatron.fabric.plan import MaskPlan
from refractor_megatron.fabric.spec import MaskSpec
from tests.masks import spec_of

CPU = torch.device("cpu")


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(plan: MaskPlan, heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> AttentionInputs:
    b, far = len(plan.samples), [normal(i, len(plan.samples), kv_heads, plan.n_far, d, dtype=dtype) for i in (3, 4)]
    tokens = [normal(i, b, kv_heads, plan.n_tokens, d, dtype=dtype) for i in (1, 2)]
    return AttentionInputs(normal(0, b, heads, plan.length, d, dtype=dtype), *tokens, *far[: 2 * bool(plan.n_far)])


def random_plan(seed: int, batch: int, length: int, spec: MaskSpec) -> MaskPlan:
    rng = np.random.default_rng(seed)
    records = torch.from_numpy(np.stack([random_records(rng, length) for _ in range(batch)]))
    return plan_for(records, compile_rules(random_rules(rng)), spec)


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize(
    "spec",
    [spec_of(None), spec_of(70, 16, 2), MaskSpec(LocalPattern("dilated", window=64, dilation=3, unit=1))],
    ids=["whole prefix", "summaries", "bits"],
)
def test_the_cpu_forward_equals_the_oracle(spec: MaskSpec, heads: tuple[int, int], block: int) -> None:
    plan = random_plan(heads[0], 2, 150, spec)
    data = inputs(plan, *heads, 8, torch.float64)
    ours, oracle = (attend(data, plan, 0.3) for attend in (flex.flex_backend(block), dense_attention))
    assert plan.stats.fully_masked_rows and not ours[~plan.dense(CPU).any(-1)[:, None].expand(ours.shape[:3])].any()
    assert float((ours - oracle).abs().max()) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_self_test_of_the_cpu_forward(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_proved", set())
    q = torch.zeros(1, 2, 8, 16, dtype=dtype)
    assert resolve("flex", AttentionInputs(q, q, q)) is registry._backends["flex"].attention

    def leaky(x: AttentionInputs, plan: MaskPlan, scale: float) -> torch.Tensor:
        return dense_attention(x, plan, scale) * 1.1

    with pytest.raises(CapabilityError, match="leaky failed its self-test on cpu .*: output differs"):
        selftest.prove("leaky", leaky, CPU, dtype, True, backward=False)


def test_through_the_entry_under_no_grad() -> None:
    plan = random_plan(1, 2, 130, spec_of(40, 16, 1))
    data = [None if x is None else x.requires_grad_() for x in inputs(plan, 4, 2, 16, torch.float32)]
    with torch.no_grad():
        ours, oracle = (tri_tier_attention(*data, plan, 0.25, name) for name in ("flex", "dense"))
    assert float((ours - oracle).abs().max()) <= 1e-5
    with pytest.raises(CapabilityError, match="flex has no backward pass on cpu; use dense or blocksparse_cpu[.]"):
        tri_tier_attention(*data, plan, 0.25, "flex")


@pytest.mark.parametrize("name", AttentionInputs._fields)
def test_a_gradient_of_any_tensor_is_refused_where_there_is_no_backward(name: str) -> None:
    plan = random_plan(1, 2, 130, spec_of(40, 16, 1))
    data = inputs(plan, 4, 2, 16, torch.float32)
    getattr(data, name).requires_grad_()
    with pytest.raises(CapabilityError, match="flex has no backward pass on cpu; use dense or blocksparse_cpu[.]"):
        tri_tier_attention(*data, plan, 0.25, "flex")


def test_pairs_and_edges_are_those_of_the_tiles() -> None:
    """The audit reads the lists and tables back, padding last; visited pairs are whole tiles."""
    backend, rows = registry._backends["flex"], np.array([0, 3, 127, 128, 259])
    for spec in (spec_of(90, 16, 2), MaskSpec(LocalPattern("dilated", window=64, dilation=3, unit=1))):
        plan = random_plan(2, 2, 260, spec)
        mask = flex.flex_mask(plan, CPU, flex.BLOCK)
        assert registry.visited_pairs("flex", plan, CPU) == mask.visited_pairs != plan.layout.visited_pairs
        for sample, legal in enumerate(plan.dense(CPU).numpy()):
            seen = backend.executed(plan, sample, rows, CPU)
            assert seen.shape == (5, mask.geometry.padded_keys) and not seen[:, legal.shape[1] :].any()
            assert (seen[:, : legal.shape[1]] == legal[rows]).all()


def test_what_it_takes_where() -> None:
    """Decided by shapes, types and devices alone; a GPU is not asked."""
    backend = registry._backends["flex"]
    on_gpu, on_cpu = (backend.on(torch.device(name)) for name in ("cuda", "cpu"))
    assert on_gpu is not None and on_cpu is not None and backend.on(torch.device("meta")) is None
    assert on_gpu.backward and on_gpu.max_len is None and torch.float64 not in on_gpu.dtypes
    assert not on_cpu.backward and on_cpu.max_len == 2048
    assert registry._AUTO["cuda"] == "flex"
    q = torch.zeros(1, 2, 4096, 16, device="meta")
    assert backend.refusal(AttentionInputs(q, q, q)) == "runs on cpu, cuda only, not on meta"


def test_flags_that_need_a_certain_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(**flags: object) -> str | None:
        can = Capabilities(True, True, frozenset({torch.float32}), None, None, **flags)  # type: ignore[arg-type]
        q, k = torch.zeros(1, 2, 32, 8), torch.zeros(1, 2, 48, 8)
        return replace(registry._backends["dense"], capabilities=(can,)).refusal(AttentionInputs(q, k, k))

    assert refusal() is None
    assert refusal(min_head_dim=16) == "needs heads of at least 16 values, not 8"
    assert "as many keys as queries, not 48 and 32 (context parallelism)" in str(refusal(rectangular=False))
    assert refusal(deterministic=False) is None
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "is not deterministic" in str(refusal(deterministic=False)) and refusal() is None


def test_what_a_process_may_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flex.missing(CPU) is None
    gpu = torch.device("cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs Triton" in str(flex.missing(gpu))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert flex.missing(gpu) is None
    with torch._dynamo.config.patch(disable=True):
        assert "TORCHDYNAMO_DISABLE" in str(flex.missing(gpu))
