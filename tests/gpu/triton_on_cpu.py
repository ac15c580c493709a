"""Torch's Triton kernels of flex attention, forward and backward, on the CPU: what a GPU would run, by the interpreter.

``python tests/gpu/triton_on_cpu.py`` proves the flex backend with them, in float32 (the interpreter has no bf16). It
has to own its process: it makes Inductor believe in an H100 whose memory is the CPU's.
"""

from __future__ import annotations

import os
from types import FunctionType
from typing import Any

import torch


def install() -> None:
    """Inductor generates, for CPU tensors, the kernels and the tuned tiles of an H100; Triton interprets them."""
    os.environ |= {"TRITON_INTERPRET": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    import torch._inductor.config as config
    import torch._inductor.kernel.flex.flex_attention as kernels
    import torch.nn.attention.flex_attention as library
    import triton
    from torch._inductor.choices import InductorChoices
    from torch._inductor.lowering import register_lowering
    from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

    triton.runtime.driver.set_active(Driver())
    config.cpu_backend = "triton"
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    InductorChoices.get_config_heuristics = lambda self, device_type="cuda": CUDAConfigHeuristic()  # type: ignore[method-assign]
    # The one test for the CPU in the lowering leads to another kernel, in C++ and without a backward pass.
    lowering = kernels.flex_attention.__wrapped__
    constants = tuple("nowhere" if constant == "cpu" else constant for constant in lowering.__code__.co_consts)
    assert constants != lowering.__code__.co_consts, "the lowering no longer asks for the CPU by name"
    code = lowering.__code__.replace(co_consts=constants)
    again = FunctionType(code, lowering.__globals__, lowering.__name__, lowering.__defaults__, lowering.__closure__)
    register_lowering(torch.ops.higher_order.flex_attention, type_promotion_kind=None)(again)
    options = library._apply_kernel_options

    def with_sums(*arguments: Any) -> Any:
        return options(*arguments) | {"OUTPUT_LOGSUMEXP": torch.is_grad_enabled()}  # the CPU would do without

    library._apply_kernel_options = with_sums  # type: ignore[assignment]
    library._validate_device = lambda *tensors: None


def main() -> None:
    """Masks of both table forms, whose samples visit different numbers of tiles, against the dense oracle."""
    install()
    from refractor_megatron.distinction.pattern import LocalPattern
    from refractor_megatron.distinction.rules import compile_rules
    from refractor_megatron.fabric import plan_for
    from refractor_megatron.fabric.backends import flex, selftest
    from refractor_megatron.fabric.backends.dense import dense_attention
    from refractor_megatron.fabric.backends.flex_mask import Geometry, lower
    from refractor_megatron.fabric.spec import MaskSpec, SummarySpec
    from tests.unit.fabric.test_flex import inputs, random_plan

    cpu, scale = torch.device("cpu"), 0.25
    tiles = {f"{way}_BLOCK_{side}": 64 for way, side in (("fwd", "M"), ("fwd", "N"), ("bwd", "M1"), ("bwd", "N1"))}
    tiles |= {"bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64}

    def geometry(plan: Any) -> Geometry:
        return Geometry(plan.length, plan.n_far, plan.n_tokens, 128)

    def attend(x: Any, mask: Any) -> torch.Tensor:
        """``flex.attend`` as on a GPU, with tiles that the interpreter is quick with."""
        joint = mask.geometry
        rows, keys, values = joint.pad_rows(x.q), joint.join_keys(x.k_far, x.k), joint.join_keys(x.v_far, x.v)
        call = flex._compiled_for(rows, keys, mask.shape_class)
        return call(rows, keys, values, mask.block_mask, scale, tiles)[:, :, : joint.rows]

    random = random_plan(2, 2, 260, MaskSpec(LocalPattern(window=90), SummarySpec(16, 2)))
    whole = plan_for(torch.zeros(2, 260, 4, dtype=torch.int32), compile_rules([]), MaskSpec())
    for plan, sizes in ((random, (8,)), (random, ()), (whole, (1,))):  # interval tables, bit tiles, full tiles
        mask = lower(plan.samples[-1:] if plan is whole else plan.samples, 2, geometry(plan), cpu, sizes)
        counts = mask.block_mask.kv_num_blocks[:, 0].tolist()
        assert mask.full_tiles if plan is whole else counts[0] != counts[1], counts
        results = []
        for attention, argument in ((attend, (mask,)), (dense_attention, (plan, scale))):
            given = inputs(plan, 2, 1, 16, torch.float32)
            leaves = [x.requires_grad_() for x in given if x is not None]
            out = attention(given, *argument)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
        names = ("output", "grad q", "grad k", "grad v", "grad k_far", "grad v_far")
        for name, ours, oracle in zip(names[: len(results[0])], *results, strict=True):
            error = float((ours - oracle).abs().max() / oracle.abs().max())
            assert error <= selftest.TOLERANCE[torch.float32], (sizes, name, error)
    print(f"proved with {len(flex._compiled)} kernels")


if __name__ == "__main__":
    main()
