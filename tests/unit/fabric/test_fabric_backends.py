"""Backends: selection and refusal in one sentence, the self-test, and the two kernels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.errors import CapabilityError
from refractor_megatron.fabric import plan_for, tri_tier_attention
from refractor_megatron.fabric.backends import (
    AttentionInputs,
    Capabilities,
    available,
    describe,
    registry,
    resolve,
    selftest,
)
from refractor_megatron.fabric.backends.blocksparse_cpu import blocksparse_attention, flash_kernel, matmul_kernel
from refractor_megatron.fabric.backends.dense import dense_attention
from refractor_megatron.fabric.plan import MaskPlan
from tests.masks import spec_of

CPU = torch.device("cpu")


def heads(length: int = 8, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(1, 2, length, 4, device=device, dtype=dtype)


def alike(x: torch.Tensor) -> AttentionInputs:
    return AttentionInputs(x, x, x)


def test_names_and_details() -> None:
    assert available() == ("dense", "blocksparse_cpu", "flex")
    assert "flash" in describe()["blocksparse_cpu"] and "oracle" in describe()["dense"]


def test_auto_is_blocksparse_on_cpu_and_dense_elsewhere() -> None:
    assert resolve("auto", alike(heads())) is registry._backends["blocksparse_cpu"].attention
    chosen = registry.select("auto", alike(heads(device="meta")))
    assert chosen.name == "dense"


def test_auto_refuses_what_no_backend_can_do() -> None:
    with pytest.raises(CapabilityError) as error:
        resolve("auto", alike(heads(4096, "meta")))
    text = str(error.value)
    assert "dense is limited to 2048 tokens" in text and "4096" in text and "meta" in text and "\n" not in text


def test_a_named_backend_is_refused_not_replaced() -> None:
    with pytest.raises(CapabilityError, match="blocksparse_cpu runs on cpu only, not on meta; use dense"):
        resolve("blocksparse_cpu", alike(heads(device="meta")))
    with pytest.raises(CapabilityError, match="dense is limited to 2048 .* use blocksparse_cpu[.]"):
        resolve("dense", alike(heads(4096)))
    with pytest.raises(CapabilityError, match="does not take torch.float16"):
        resolve("blocksparse_cpu", alike(heads(dtype=torch.float16)))
    with pytest.raises(CapabilityError, match="'magi' does not exist; choose auto, dense, blocksparse_cpu, flex"):
        resolve("magi", alike(heads()))


def test_flags_for_gqa_and_backward() -> None:
    flags = Capabilities(backward=False, gqa=False, dtypes=frozenset({torch.float32}), devices=None, max_len=None)
    backend = replace(registry._backends["dense"], name="forward-only", capabilities=(flags,))
    assert backend.refusal(alike(heads())) is None
    key = heads()[:, :1]
    assert "as many key heads" in str(backend.refusal(AttentionInputs(heads(), key, key)))
    assert "no backward pass on cpu" in str(backend.refusal(alike(heads().requires_grad_())))
    with torch.no_grad():
        assert backend.refusal(alike(heads().requires_grad_())) is None


def test_a_wrong_backend_fails_its_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that lets one summary too many through is found out before its first use."""

    def leaky(x: AttentionInputs, plan: MaskPlan, scale: float) -> torch.Tensor:
        assert x.v_far is not None
        return dense_attention(x, plan, scale) + 1e-3 * x.v_far.mean(2, keepdim=True).repeat(1, 2, 1, 1)

    flags = Capabilities(True, True, frozenset({torch.float32}), None, None)
    wrong = replace(registry._backends["dense"], name="leaky", attention=leaky, capabilities=(flags,))
    monkeypatch.setitem(registry._backends, "leaky", wrong)
    plan = plan_for(torch.zeros(1, 8, 4, dtype=torch.int32), compile_rules([]), spec_of(None))
    q = torch.randn(1, 2, 8, 4)
    for _ in range(2):
        with pytest.raises(CapabilityError, match="leaky failed its self-test on cpu in torch.float32: output differs"):
            tri_tier_attention(q, q, q, None, None, plan, 1.0, "leaky")


def test_the_way_out_of_a_failed_self_test_serves_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is advice only where its length limit allows it."""

    def wrong(x: AttentionInputs, plan: MaskPlan, scale: float) -> torch.Tensor:
        return 2 * dense_attention(x, plan, scale)

    monkeypatch.setitem(
        registry._backends, "blocksparse_cpu", replace(registry._backends["blocksparse_cpu"], attention=wrong)
    )
    monkeypatch.setattr(registry, "_proved", set())
    with pytest.raises(CapabilityError, match="output differs .*; use dense[.]"):
        resolve("auto", alike(heads(2048).requires_grad_()))
    with pytest.raises(CapabilityError, match="output differs .*; use another torch or device[.]"):
        resolve("auto", alike(heads(4096).requires_grad_()))


def test_visited_pairs_are_those_of_the_backend() -> None:
    plan = plan_for(torch.zeros(2, 300, 4, dtype=torch.int32), compile_rules([]), spec_of(40, 16, 2))
    assert registry.visited_pairs("auto", plan, CPU) == plan.layout.visited_pairs
    assert registry.visited_pairs(registry.select("auto", alike(heads())), plan, CPU) == plan.layout.visited_pairs
    assert registry.visited_pairs("dense", plan, CPU) == 2 * 300 * (300 + 18 * 2)
    assert registry.visited_pairs("auto", plan, torch.device("meta")) == 2 * 300 * (300 + 18 * 2), "dense elsewhere"
    with pytest.raises(CapabilityError, match="'magi' does not exist"):
        registry.visited_pairs("magi", plan, CPU)


def test_the_self_test_sees_every_part_of_the_layout() -> None:
    """Masked and unmasked visits, keys of every tier, and rows that two visits serve."""
    plan = selftest._probe_plan(CPU)
    kinds = {(visit.mask is None, visit.opens) for visit in plan.layout.visits}
    assert {(False, True), (True, False)} <= kinds
    legal = plan.dense(CPU).any(0).any(0)
    level2, level1 = plan.space.level2, plan.space.level1
    for lo, hi in ((0, level2), (level2, level2 + level1), plan.tiers["retrieved"], plan.tiers["local"]):
        assert bool(legal[lo:hi].any())


def test_a_kernel_with_another_log_sum_exp_fails_its_self_test() -> None:
    """Two-based instead of natural, say, after an update of torch: single visits would not notice."""
    kernel = matmul_kernel()

    def forward(*args):  # type: ignore[no-untyped-def]
        out, lse = kernel.forward(*args)
        return out, lse / math.log(2)

    wrong = blocksparse_attention(replace(kernel, forward=forward))
    with pytest.raises(CapabilityError, match="output differs"):
        selftest.prove("wrong", wrong, CPU, torch.float64, True, backward=False)


def test_the_self_test_runs_once_and_leaves_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(registry, "prove", lambda *args: calls.append(args))
    monkeypatch.setattr(registry, "_proved", set())
    for _ in range(3):
        resolve("blocksparse_cpu", alike(heads()))
    assert len(calls) == 1
    state = torch.random.get_rng_state()
    errors = selftest.prove("dense", dense_attention, CPU, torch.float32, True)
    assert len(errors) == 6 and max(errors.values()) <= 1e-5
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["flash", "matmul"])
def test_both_kernels_pass_the_self_test(name: str, dtype: torch.dtype) -> None:
    kernel = flash_kernel() if name == "flash" else matmul_kernel()
    assert kernel is not None
    for gqa in (True, False):
        selftest.prove(name, blocksparse_attention(kernel), CPU, dtype, gqa)


def test_a_missing_or_changed_private_op_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Schema:
        arguments = ()

    class Op:
        class default:  # noqa: N801
            _schema = Schema

    class Aten:
        _scaled_dot_product_flash_attention_for_cpu = Op
        _scaled_dot_product_flash_attention_for_cpu_backward = Op

    for aten in (object(), Aten()):
        monkeypatch.setattr("refractor_megatron.fabric.backends.blocksparse_cpu._aten", lambda aten=aten: aten)
        assert flash_kernel() is None
